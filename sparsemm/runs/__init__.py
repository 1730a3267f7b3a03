"""What long work shares: journals, processes, result files, metrics, tables and plots."""
