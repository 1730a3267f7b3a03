"""Tensor parallelism: the processes that hold one model together, what each has of it, and how they agree."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsemm.errors import ConfigError, SparseMMError, UnsupportedModelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=7)
"""One process may load, read or write for long; one that dies is noticed by its closed connections."""


@dataclass(frozen=True)
class TensorParallel:
    """The processes that hold one model together, and which of them this is. All they do here they do together: each
    process makes the same calls in the same order.

    Attributes:
        rank: Number of this process among them.
        size: How many they are.
        group: To send and receive in; None for a process alone.
        divided: Whether the attention heads are divided among them; else each process has all of them.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    divided: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """Which of `count` heads of the model this process has."""
        each = count // self.size if self.divided else count
        return slice(self.rank * each, (self.rank + 1) * each) if self.divided else slice(0, count)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """What belongs to all heads of the model, made of what belongs to each process's own, heads along `dim`."""
        if not self.divided:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def collect(self, value: Any) -> list[Any]:
        """The small value of every process, in their order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first_of(self, value: T | None) -> T | None:
        """What the first process has that has anything: a reason to refuse is then one for all."""
        return next((each for each in self.collect(value) if each is not None), None)

    def all(self, verdict: bool) -> bool:
        """Whether every process says so."""
        return all(self.collect(verdict))

    def share_generator(self, device: torch.device) -> None:
        """Let all draw what the first one draws from the default generator of `device` from here on."""
        if self.size > 1:
            state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            state = self.collect(state)[0]
            torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)

    def together(self, find: Callable[[], T]) -> T:
        """`find()`, which sends nothing. What is raised in one process is raised in all: those that go on would wait
        for it for ever."""
        found, error, said = None, None, None
        try:
            found = find()
        except Exception as raised:
            error = raised
            kind = type(error) if isinstance(error, SparseMMError) else RuntimeError
            said = kind, f"{error} (so says process {self.rank} of the {self.size} that hold the model)"
        other = self.first_of(said)
        if error is not None:
            raise error
        if other is not None:
            kind, message = other
            raise kind(message)
        return found


ALONE = TensorParallel()


def tensor_parallel_of(model: nn.Module) -> TensorParallel:
    """Who holds `model`, by its weights: DTensors where transformers has divided them. `divided` is left open."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    from torch.distributed.tensor import DTensor

    mesh = next((mesh_of(each) for each in model.parameters() if isinstance(each, DTensor)), None)
    return ALONE if mesh is None else TensorParallel(mesh.get_local_rank(), mesh.size(), mesh.get_group())


def mesh_of(weight: Any) -> DeviceMesh:
    """The processes that have a part of a weight each."""
    mesh = weight.device_mesh
    return mesh["tp"] if mesh.ndim > 1 else mesh


def own(tensor: Tensor) -> Tensor:
    """The part of a weight that this process has; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a weight of which each process has a part; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# -- processes of a launcher -------------------------------------------------------------------------------------------

_meshes: dict[int, DeviceMesh] = {}  # by how many processes hold a model
_joined: TensorParallel = ALONE


def joined() -> TensorParallel:
    """The processes that this one has joined to hold models together; `ALONE` before `join`."""
    return _joined


def launched() -> int:
    """How many processes a launcher (torchrun, `accelerate launch`) has started; 1 without one.

    Raises `ConfigError` where what it says is no number.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal():
        raise ConfigError(f"WORLD_SIZE={said!r} of the environment is no number of processes; unset it")
    return int(said)


def join(size: int | None = None) -> TensorParallel:
    """Become one of `size` processes that hold a model together; None: of all that the launcher has started.

    Starts the process group by the variables of torchrun where there is none. Where the launcher has started a multiple
    of `size`, every `size` of them in a row hold a model of their own.

    Raises `ConfigError` where no launcher has started as many processes.
    """
    global _joined
    started = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if started else launched()
    size = world if size is None else size
    if size < 2 or world % size:
        wanted = "two processes or more" if size < 2 else f"a multiple of {size} processes"
        raise ConfigError(
            f"tensor parallelism needs {wanted}, and there is {world}; start them with torchrun --nproc-per-node N, or "
            "let sparsemm do it with --tensor-parallel N"
        )
    if not started:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE={world} is set in the environment, and {', '.join(missing)} not: start the processes with "
                "torchrun --nproc-per-node N, or unset WORLD_SIZE and let sparsemm do it with --tensor-parallel N"
            )
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else None
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE, device_id=device)
    if size not in _meshes:
        kind = "cuda" if "nccl" in dist.get_backend() else "cpu"
        _meshes[size] = dist.init_device_mesh(kind, (world // size, size), mesh_dim_names=("data", "tp"))
    mesh = _meshes[size]["tp"]
    _joined = TensorParallel(mesh.get_local_rank(), mesh.size(), mesh.get_group())
    return _joined


def check_plan(config: PretrainedConfig, size: int) -> None:
    """Refuse a model that cannot be divided, before its weights are loaded.

    Raises:
        UnsupportedModelError: transformers has no plan for it.
        ConfigError: Its heads do not divide among so many processes, and the plan does not replicate them.
    """
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise UnsupportedModelError(
            f"transformers has no tensor-parallel plan for model type {text.model_type!r}; load it with device=auto, "
            "which spreads the layers over the GPUs"
        )
    heads = {"k_proj": text.num_key_value_heads, "q_proj": text.num_attention_heads}
    for name, count in heads.items():
        if plan.get(f"layers.*.self_attn.{name}") == "colwise" and count % size:
            kind = "kv" if name == "k_proj" else "query"
            raise ConfigError(
                f"tensor_parallel={size}: the {count} {kind} heads of the model do not divide among so many processes; "
                f"use a divisor of {text.num_key_value_heads}"
            )


def divide(load: Callable[..., nn.Module], parallel: TensorParallel) -> nn.Module:
    """The model that `load` gives, a `from_pretrained` that is handed more arguments, divided among the processes of
    `parallel`."""
    with _placed_on(parallel) as placement:
        model = load(**placement)
    head = model.get_output_embeddings()
    if head is not None and hasattr(head.weight, "device_mesh") and "forward" not in vars(head):
        # In transformers 5.17 an output matrix tied to the embedding is divided with it, and has no rule of its own.
        head.weight = nn.Parameter(whole(head.weight.detach()), requires_grad=False)
    return model


@contextmanager
def _placed_on(parallel: TensorParallel) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` that divide a model among the processes of `parallel`, while the context lasts."""
    from transformers import PreTrainedModel
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=parallel.size)
    if parallel.size == dist.get_world_size():
        yield {"distributed_config": config}
        return
    # transformers divides a model among all processes there are; it is told here that there are several models.
    original = PreTrainedModel.__dict__.get("prepare_distribute_model")

    def prepare(cls: type, given: Any, *, device_map: Any = None, device_mesh: Any = None) -> tuple[Any, Any, Any]:
        return given, *_device_and_mesh(config, parallel.size)

    PreTrainedModel.prepare_distribute_model = classmethod(prepare)
    try:
        yield {"distributed_config": config}
    finally:
        if original is None:
            del PreTrainedModel.prepare_distribute_model
        else:
            PreTrainedModel.prepare_distribute_model = original


def _device_and_mesh(config: Any, size: int) -> tuple[Any, Any]:
    """What transformers' own preparation returns, for one of several models."""
    if hasattr(config, "dp_replicate_size"):
        from transformers.distributed.utils import initialize_distributed_mesh

        return initialize_distributed_mesh(replace(config, dp_replicate_size=dist.get_world_size() // size))
    mesh = _meshes[size]["tp"]  # before transformers 5.21
    index = int(os.environ["LOCAL_RANK"])
    return torch.device(mesh.device_type, index) if mesh.device_type == "cuda" else torch.device("cpu"), mesh
