"""Running a step over and over: captured in a CUDA graph where there is CUDA, called where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from sparsemm.cache import SparseCache
from sparsemm.decoding.step import rotation_that_reads_positions
from sparsemm.models.layers import sliding_windows
from sparsemm.ops.backends import missing_reason
from sparsemm.plan import GROWTH_ROWS

logger = logging.getLogger(__name__)


def why_no_graph(text_model: nn.Module, decode_backend: str = "auto") -> str | None:
    """Why decode steps of this model cannot be a CUDA graph here; None when they can."""
    if decode_backend == "reference":
        return "the reference backend reads lengths on the host"
    devices = {parameter.device for parameter in text_model.parameters()}
    if {device.type for device in devices} != {"cuda"}:
        return "the language model is not on a GPU"
    if len(devices) > 1:
        return f"the language model is spread over {len(devices)} devices"
    if any(sliding_windows(text_model.config)):
        return "layers with a sliding window keep transformers' own cache, which moves at every token"
    head_dim = text_model.layers[0].self_attn.head_dim
    if reason := missing_reason("cuda", devices.pop(), text_model.dtype, head_dim):
        return f"the kernels cannot serve ({reason}), and their PyTorch twins read lengths on the host"
    if rope_type := rotation_that_reads_positions(text_model.rotary_emb):
        return f"rotary embedding of type {rope_type!r} reads positions on the host"
    return None


class CudaGraphs:
    """Captures steps on one stream, into one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run `body` on the stream that will be captured: libraries keep workspaces per stream."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            body()
        current.wait_stream(self.stream)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Record `body` without running it; the function returned replays it on the current stream."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # Other threads, a streamer's reader say, may use CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                body()
        except BaseException:
            torch.cuda.set_stream(current)  # a capture that fails to end leaves its own one current
            raise
        return graph.replay


class StepRunner:
    """Runs `body`, a step that appends one token of every sequence to `cache`, as often as asked.

    The first run is an ordinary one: it is a real step, and warms up what the libraries set up lazily. The second is
    captured, and from then on replayed. When the buffers are full they grow, and the step is captured anew. A step that
    is broken off by an exception is taken back.

    Attributes:
        captures: Graphs captured so far.
    """

    def __init__(
        self,
        body: Callable[[], None],
        cache: SparseCache,
        graphs: CudaGraphs | None,
        *,
        growth: int = GROWTH_ROWS,
        watched: bool = False,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            body: Device work only, on tensors that keep their addresses (see `DecodeStep`).
            graphs: Captures the step; None runs it as it is. Only where `why_no_graph` says None.
            growth: Tokens to make room for when the buffers are full.
            watched: Something looks into the cache while a step runs; not with `graphs`.
            prepare: Told how many steps may follow before it is asked again.
        """
        self.watched, self._prepare = watched, prepare
        self.body, self.cache, self.growth = body, cache, growth
        self.captures = 0
        self._graphs = graphs
        self._replay: Callable[[], None] | None = None
        self._warm = False  # whether a first step has set up what the libraries set up lazily
        self._begin()

    def _begin(self) -> None:
        self._room, self._steps = self.cache.room, 0  # steps until the buffers are full, and those run
        self.cache.begin_steps(watched=self.watched)
        if self._prepare is not None:
            self._prepare(self._room)

    def __call__(self) -> None:
        if self._steps == self._room:
            self._make_room()
        try:
            if self._graphs is None:
                self.body()
            elif not self._warm:
                self._graphs.warm_up(self.body)
                self._warm = True
            else:
                if self._replay is None:
                    self._capture()
                (self._replay or self.body)()
            self._steps += 1  # from here on the step is a whole one
        except BaseException:
            self.finish()
            self.cache.roll_back()
            raise

    def finish(self) -> None:
        """Bring the cache's accounting up to date. To be called after the last step, and harmless in between."""
        self.cache.count_steps(self._steps)

    def _make_room(self) -> None:
        self.finish()
        self._replay = None  # its memory is freed before the buffers grow, and it must never run again
        self.cache.grow(self.growth)
        self._begin()

    def _capture(self) -> None:
        try:
            self._replay = self._graphs.capture(self.body)
        except RuntimeError as error:
            logger.warning("the decode step could not be captured (%s); it runs without a graph", error)
            self._graphs = None
            return
        self.captures += 1
