#!/usr/bin/env bash
# How well real pages are boxed and their readings matched: fetches PDF files of Debian documentation packages, reads
# pages of theirs in several orders and with errors, and prints the tables of assets/benchmarks/README.md. For machines
# with apt-get; wants the vocabularies of `make vocabularies`. What was fetched is used again.
#
#   bash scripts/others/document_figures.sh FOLDER
#
# Variables:
#   PACKAGES  Debian packages that hold PDF files     (debian-policy debmake-doc installation-guide-amd64 4ti2-doc)
#   PAGES     pages of each file, drawn by chance     (2)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

read -ra packages <<<"${PACKAGES:-debian-policy debmake-doc installation-guide-amd64 4ti2-doc}"
run_tool python "$scripts_folder/../tests/support/document_figures.py" "${1:?name a folder to keep the files in}" \
    --packages "${packages[@]}" --pages "${PAGES:-2}"
