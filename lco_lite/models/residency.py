"""What is on the device: of a base in use all of it, or of a streamed one a block at a time; of a parked one its head.

Frozen weights never change. Their copy on the host is made once; from then on to leave the device is to drop what is
there, and to come back is to copy. LoRA weights, trained weights and the LM head, which losses need, always stay.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

ALIGNMENT = 512  # bytes; that of CUDA's allocator
PIECE = 2**24  # bytes; torch rounds each pinned allocation up to a power of two


class Bundle:
    """Frozen tensors that come and go together: pieces of bytes on the host, views of one buffer on the device.

    While they are away they are empty, so that whatever uses them by mistake fails. ``drain`` frees the buffer's memory
    and keeps the views: what an autograd graph holds of them is whole again after the next ``fill``.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self.tensors, self.device, self.size = list(tensors), device, 0
        self.host: list[tuple[int, Tensor]] = []  # (place in the buffer, bytes), made when it leaves for the first time
        self.places: list[tuple[slice, torch.dtype, torch.Size]] = []
        self.buffer: Tensor | None = None
        self.away = self.filled = False
        self.arrival: Any = None  # of what is on its way, on another CUDA stream

    @torch.no_grad()
    def leave(self) -> None:
        """Nothing of it is on the device."""
        if self.away:
            return
        if not self.places:
            self._copy_to_host()
        for tensor in self.tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)
        self.wait()
        self.buffer, self.away, self.filled = None, True, False

    def _copy_to_host(self) -> None:
        places, host, size, starts = list[Any](), list[tuple[int, Tensor]](), 0, dict[Any, int]()
        for tensor in self.tensors:
            memory = (tensor.untyped_storage(), tensor.storage_offset(), tensor.nbytes)
            place = start = starts.setdefault(memory, size)
            places.append((slice(start, start + tensor.nbytes), tensor.dtype, tensor.shape))
            if start < size:
                continue  # it is another's memory
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            for piece in tensor.detach().reshape(-1).view(torch.uint8).split(PIECE):
                kept = torch.empty(len(piece), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
                host.append((place, kept.copy_(piece)))
                place += len(piece)
        self.places, self.host, self.size = places, host, size

    def come(self) -> None:
        """Every tensor is a view of the buffer, which is drained."""
        self.buffer, self.away = torch.empty(self.size, dtype=torch.uint8, device=self.device), False
        for tensor, (place, dtype, shape) in zip(self.tensors, self.places, strict=True):
            tensor.data = self.buffer[place].view(dtype).view(shape)
        self.drain()

    @torch.no_grad()
    def fill(self, aside: Any = None) -> bool:
        """The bytes come from the host; False where they are there already. ``aside`` is the CUDA stream that brings
        them while others compute."""
        if self.buffer is None or self.filled:
            return False
        self.buffer.untyped_storage().resize_(self.size)
        if aside is not None:
            aside.wait_stream(torch.cuda.current_stream(self.device))  # what used this memory before
        with contextlib.nullcontext() if aside is None else torch.cuda.stream(aside):
            for place, piece in self.host:
                self.buffer[place : place + len(piece)].copy_(piece, non_blocking=True)
        if aside is not None:
            self.arrival = aside.record_event()
        self.filled = True
        return True

    def wait(self) -> None:
        """What is queued from here on sees the bytes."""
        if self.arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrival)
            self.arrival = None

    def drain(self) -> None:
        if self.buffer is not None:
            self.wait()
            self.buffer.untyped_storage().resize_(0)
            self.filled = False


class FrozenWeights:
    """The frozen weights of one base, whose ``blocks`` are given in their order. ``others``: the bases that it shares
    the device with; those that nobody holds leave when this one is asked for. ``say`` is told of it once.

    Streamed, ``base`` is on the host to begin with. Its blocks are on the device one at a time, the next on its way; in
    a backward pass they come in the opposite order. Its input embedding is looked up on the host where it is not tied
    to the head.
    """

    def __init__(
        self,
        base: Any,
        decoder: Module,
        blocks: Sequence[Module],
        device: torch.device,
        others: weakref.WeakSet[FrozenWeights],
        streamed: bool = False,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.device, self.others, self.streamed, self.say = device, others, streamed, say
        self.name = str(base.name_or_path).rstrip("/").rpartition("/")[2] or type(base).__name__
        self.holders, self.now = 0, -1  # now: the block that is computed, or was last
        self.side: Any = torch.cuda.Stream(device) if streamed and device.type == "cuda" else None
        nested = {inner for block in blocks for inner in block.modules() if inner is not block}
        blocks = [block for block in blocks if block not in nested]
        head = list(base.get_output_embeddings().parameters())
        seen = set(map(id, head))

        def unseen(module: Module) -> list[Tensor]:
            found = [t for t in frozen_tensors(module) if id(t) not in seen and t.numel() and t.is_contiguous()]
            seen.update(map(id, found))
            return found

        self.bundles = [Bundle(unseen(module), device) for module in (*blocks, *([] if streamed else [base]))]
        if streamed:
            for bundle in self.bundles:
                bundle.leave()
            embedding = base.get_input_embeddings()
            if all(embedding.weight is not weight for weight in head):
                unseen(embedding)
                _look_up_on_host(embedding, device)
            for tensor in (*head, *(t for t in frozen_tensors(decoder) if id(t) not in seen)):
                tensor.data = tensor.data.to(device)
            for state in (getattr(weight, "quant_state", None) for weight in decoder.parameters()):
                _put_tables(state, device)
            for i, block in enumerate(blocks):
                self._take_turns(i, block)
            say(f"{self.name}: {len(blocks)} blocks, {_mib(self.size)}, are streamed from the host's memory")
        others.add(self)

    @property
    def size(self) -> int:
        """Bytes that come and go."""
        return sum(bundle.size for bundle in self.bundles)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """On the device for the length of the block, and after it until another base is asked for: an update's backward
        pass comes later. A streamed one is there block by block."""
        if not self.holders:
            make_room(other for other in self.others if other is not self)
            self.come()
        self.holders += 1
        try:
            yield
        finally:
            self.holders -= 1
            if self.streamed and not self.holders and not torch.is_grad_enabled():
                self._keep(())
                self.now = -1

    def come(self) -> None:
        """Goes on where memory ran out before."""
        for bundle in self.bundles:
            if bundle.away:
                bundle.come()
        filled = [] if self.streamed else [bundle.fill() for bundle in self.bundles]
        if any(filled):
            _synchronise(self.device)  # engines compute in streams and threads of their own

    def leave(self) -> None:
        if all(bundle.away for bundle in self.bundles):
            return
        _synchronise(self.device)
        for bundle in self.bundles:
            bundle.leave()
        self.now = -1
        if not self.streamed:
            self.say(f"{self.name}: {_mib(self.size)} of frozen weights lie on the host while another model works")
            self.say = lambda text: None  # once

    def exclude(self, trained: Iterable[Tensor]) -> None:
        """These are trained from here on: they stay, each in memory of its own."""
        own = set(map(id, trained))
        with self.held():
            for k, bundle in enumerate(self.bundles):
                if own.isdisjoint(map(id, bundle.tensors)):
                    continue
                for tensor in bundle.tensors if bundle.buffer is not None else ():
                    tensor.data = tensor.data.clone()
                self.bundles[k] = Bundle((t for t in bundle.tensors if id(t) not in own), self.device)

    def _take_turns(self, i: int, block: Module) -> None:
        own: Any = vars(block).get("forward") or block.forward

        @functools.wraps(own)
        def forward(*args: Any, **kw: Any) -> Any:
            if i != self.now or i == 0:  # else it is made again in a backward pass, which has fetched it
                self._turn(i, i + 1)
            out = own(*args, **kw)
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:  # before anything of the block is differentiated
                hidden.register_hook(lambda gradient: self._turn(i, i - 1))
            return out

        vars(block)["forward"] = forward

    def _turn(self, i: int, following: int) -> None:
        """Block ``i`` is on the device, the ``following`` one on its way; no other is."""
        self.now = i
        self._keep((i, following))
        self.bundles[i].fill()
        self.bundles[i].wait()
        if 0 <= following < len(self.bundles):
            self.bundles[following].fill(self.side)

    def _keep(self, some: Sequence[int]) -> None:
        for k, bundle in enumerate(self.bundles):
            if k not in some:
                bundle.drain()


def make_room(bases: Iterable[FrozenWeights]) -> None:
    """Those that nobody holds leave the device."""
    for base in list(bases):
        if not base.holders:
            base.leave()


def frozen_tensors(module: Module) -> Iterator[Tensor]:
    """Its weights and buffers; of bitsandbytes' layers the packed weights and their scales too. Tables of code, which
    layers may share, are none of them."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:  # NF4
            yield state.absmax
            if state.nested:
                yield state.state2.absmax
        yield from (t for t in (getattr(tensor, "CB", None), getattr(tensor, "SCB", None)) if t is not None)  # LLM.int8


def _put_tables(state: Any, device: torch.device) -> None:
    """What is left of an NF4 weight's state. A new tensor: others may share the old one."""
    if state is not None:
        state.code = state.code.to(device)
    if state is not None and state.nested:
        state.offset, state.state2.code = state.offset.to(device), state.state2.code.to(device)


def _look_up_on_host(embedding: Module, device: torch.device) -> None:
    """Its weight is empty but for its forward pass, so that the model's device is that of everything else."""
    own: Any = vars(embedding).get("forward") or embedding.forward
    weight: Any = embedding.weight
    rows = weight.data
    weight.data = torch.empty(0, dtype=rows.dtype, device=device)

    @functools.wraps(own)
    def forward(ids: Tensor) -> Tensor:
        weight.data = rows
        try:
            return own(ids.to(rows.device)).to(device)
        finally:
            weight.data = torch.empty(0, dtype=rows.dtype, device=device)

    vars(embedding)["forward"] = forward


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
