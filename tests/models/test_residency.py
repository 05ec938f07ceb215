"""Weights that come and go compute the same bits, and are gone while they are away. The device is a CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes import MatmulLtState
from bitsandbytes.functional import QuantState
from torch.autograd.graph import saved_tensors_hooks

from lco_lite.models import language_model, residency
from lco_lite.models.language_model import LanguageModel, Role, together
from lco_lite.models.loading import load_base, load_tokenizer
from lco_lite.models.residency import Bundle, FrozenWeights
from lco_lite.plan import LiveBytes
from lco_lite.recipe.sections import Lora, Model, Rollout
from lco_lite.rollout.engine import Sampling, in_order, open_engine
from lco_lite.rollout.hf import HFEngine
from lco_lite.rollout.lockstep import mixture
from lco_lite.sequences import Example, collate
from tests.models.families import save

CPU = torch.device("cpu")
EXAMPLES = [Example([5, 6, 7], [8, 9, 10, 11]), Example([12, 6], [8, 9])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved model of a family, of four blocks."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        kinds = ["full_attention", "sliding_attention" if "gemma" in family else "full_attention"]
        if not (root / family).exists():
            save(family, root / family, num_hidden_layers=4, layer_types=kinds * 2)
        return root / family

    return folder


def opened(
    folder: Path,
    streamed: bool | None = None,
    others: weakref.WeakSet | None = None,
    say=print,
    device: torch.device = CPU,
    **weights,
) -> LanguageModel:
    """With an adapter that does something; ``streamed`` None: all of it always resident."""
    settings = Model(path=str(folder), **weights)
    group = weakref.WeakSet() if others is None else others
    how = None if streamed is None else partial(FrozenWeights, device=device, others=group, streamed=streamed, say=say)
    base = load_base(settings, device, on_host=bool(streamed))
    model = LanguageModel(base, load_tokenizer(settings), frozen=how)
    adapted(model)
    return model


def adapted(model: LanguageModel) -> None:
    model.add_adapter("policy", Lora(r=4), 1)
    with torch.no_grad():
        for name, p in model.trainable("policy"):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).to(p.device)


def states_and_gradients(model: LanguageModel) -> list[torch.Tensor]:
    trained = model.trainable("policy")
    with model.training_mode():
        hidden = Role(model, "policy").hidden(collate(EXAMPLES, 0))
        model.head.logits(hidden).logsumexp(-1).sum().backward()
    made = [hidden.detach(), *(p.grad for _, p in trained if p.grad is not None)]
    for _, p in trained:
        p.grad = None
    return made


def on_device(model: LanguageModel) -> list[bool]:
    """Of each bundle, whether its bytes are on the device."""
    assert model.frozen is not None
    return [b.filled or (b.buffer is None and not b.away) for b in model.frozen.bundles]


@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "none"), ("llama3.2", "nf4"), ("gemma3-vision", "nf4"), ("llama", "int8")]
)
def test_what_was_parked_and_what_is_streamed_gives_the_same_bits(folders, monkeypatch, family, quantization):
    """Hidden states and gradients, with activations kept, made again, or made again from inputs on the host."""
    monkeypatch.setattr(residency, "PIECE", 1000)
    models = [opened(folders(family), streamed, quantization=quantization) for streamed in (None, False, True)]
    for checkpointing in (False, True, "offload"):
        for model in models:
            model.checkpointing = checkpointing
            if model.frozen is not None:
                model.frozen.leave()
        plain, parked, streamed = map(states_and_gradients, models)
        assert len(plain) > 8 and all(gradient.any() for gradient in plain)
        for other in (parked, streamed, states_and_gradients(models[2])):
            assert len(other) == len(plain) and all(map(torch.equal, plain, other)), checkpointing


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_of_a_streamed_base_two_blocks_are_on_the_device_at_most(folders, monkeypatch, quantization, checkpointing):
    """While it is opened, scores, is trained and is sampled from. Its input embedding never is; its head always."""
    most, seen = [0], list[FrozenWeights]()
    real = Bundle.fill

    def fill(self, aside=None):
        real(self, aside)
        most[0] = max(
            most[0], sum(b.buffer.untyped_storage().nbytes() for b in seen[0].bundles if b.buffer is not None)
        )

    monkeypatch.setattr(Bundle, "fill", fill)
    monkeypatch.setattr(
        FrozenWeights, "_take_turns", wrapped(FrozenWeights._take_turns, lambda self: seen.append(self))
    )
    model = opened(folders("llama"), True, quantization=quantization)
    model.checkpointing = checkpointing
    block = max(bundle.size for bundle in seen[0].bundles)
    assert len(seen[0].bundles) == 4 and most == [2 * block]
    states_and_gradients(model)
    engine = open_engine([Role(model, "policy")], 3)
    list(engine.generate([[5, 6]], Sampling(0, 1.0, 3, 1)))
    assert most == [2 * block] and not any(on_device(model))
    assert model.base.get_input_embeddings().weight.numel() == 0 and model.head.weight.numel() > 0


def wrapped(real, before):
    def wrapper(self, *args):
        before(self)
        return real(self, *args)

    return wrapper


def reachable(thing: object, seen: dict[int, object]) -> list[torch.Tensor]:
    """Tensors in a module's attributes, however deep: weights, buffers, what bitsandbytes keeps beside them."""
    if id(thing) in seen:
        return []
    seen[id(thing)] = thing
    found = [thing] if isinstance(thing, torch.Tensor) else []
    inner = list(thing.values()) if isinstance(thing, dict) else list(getattr(thing, "__dict__", {}).values())
    inner += thing if isinstance(thing, (list, tuple)) else []
    holders = (torch.nn.Module, torch.Tensor, dict, list, tuple, QuantState, MatmulLtState)
    return found + [t for one in inner if isinstance(one, holders) for t in reachable(one, seen)]


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("llama", "nf4"), ("llama", "int8"), ("llama3.2", "none"), ("gemma3-vision", "nf4"), ("opt", "none")],
)
def test_all_that_a_streamed_base_computes_with_is_sent_to_the_device(folders, monkeypatch, family, quantization):
    """On a CPU nothing fails that was forgotten on the host, so that what is sent is written down."""
    settings, sent, real = Model(path=str(folders(family)), quantization=quantization), set[int](), torch.Tensor.to

    def to(self, *args, **kw):
        sent.update((self.data_ptr(),) if args == (CPU,) else ())
        return real(self, *args, **kw)

    base = load_base(settings, CPU)
    how = partial(FrozenWeights, device=CPU, others=weakref.WeakSet(), streamed=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        model = LanguageModel(base, load_tokenizer(settings), frozen=how)
    assert model.frozen is not None
    embedding = base.get_input_embeddings()
    on_host = () if embedding.weight is model.head.weight else (*embedding.parameters(), *embedding.buffers())
    moved = {id(t) for bundle in model.frozen.bundles for t in bundle.tensors} | {id(t) for t in on_host}
    everything = reachable([model.decoder, base.get_output_embeddings()], {})
    forgotten = [t for t in everything if t.numel() and id(t) not in moved and t.data_ptr() not in sent]
    assert len(everything) > 30 and len(sent) > 1
    assert not forgotten, [(t.shape, t.dtype) for t in forgotten]


def test_a_parked_base_is_gone_from_the_device_but_for_its_head_and_adapters(folders):
    group = weakref.WeakSet()
    first, second = (opened(folders(f), False, group, quantization=q) for f, q in (("qwen2", "none"), ("llama", "nf4")))
    assert first.frozen is not None and second.frozen is not None
    for model in (first, second):
        model.frozen.leave()  # the copies on the host are there from now on
    kept = {id(p) for p in first.base.get_output_embeddings().parameters()} | {
        id(p) for name, p in first.base.named_parameters() if ".lora_" in name
    }
    left = [p for p in first.base.parameters() if p.numel() and id(p) not in kept]
    assert not left and first.frozen.size > 0
    now = []
    with LiveBytes() as live:
        for model, other in 2 * [(first, second), (second, first)]:
            Role(model, "policy").hidden(collate(EXAMPLES, 0))
            gc.collect()
            assert all(on_device(model)) and not any(on_device(other))
            now.append(live.here.now)
    assert now[2] - now[1] == first.frozen.size - second.frozen.size == now[2] - now[3] > 0
    with pytest.raises(RuntimeError):
        first.base(input_ids=torch.tensor([[1, 2]]))  # nobody asked for it: an error, no wrong numbers


@pytest.mark.parametrize("streamed", [False, True])
def test_where_memory_runs_out_on_the_way_the_rest_comes_the_next_time(folders, monkeypatch, streamed):
    model, real, calls = opened(folders("llama"), streamed), Bundle.fill, [0]
    plain, batch = Role(model, "policy").hidden(collate(EXAMPLES, 0)).detach(), collate(EXAMPLES, 0)
    assert model.frozen is not None
    model.frozen.leave()

    def fill(self, aside=None):
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError
        return real(self, aside)

    monkeypatch.setattr(Bundle, "fill", fill)
    with pytest.raises(torch.OutOfMemoryError):
        Role(model, "policy").hidden(batch)
    assert torch.equal(Role(model, "policy").hidden(batch), plain)


def test_bases_that_are_held_together_stay_and_the_others_leave(folders):
    group, said = weakref.WeakSet(), list[str]()
    policy, teacher, third = (opened(folders("llama"), False, group, said.append) for _ in range(3))
    roles = [Role(policy, "policy"), Role(teacher, "policy"), Role(third)]

    def present() -> list[bool]:
        return [any(on_device(model)) for model in (policy, teacher, third)]

    with together(roles[0], None, roles[1]):
        assert present() == [True, True, False]
        roles[1].hidden(collate(EXAMPLES, 0))
        roles[0].hidden(collate(EXAMPLES, 0))
        assert present() == [True, True, False]
    assert present() == [True, True, False], "until another is asked for: a backward pass may come"
    roles[2].hidden(collate(EXAMPLES, 0))
    assert present() == [False, False, True]
    plain = [Role(opened(folders("llama")), "policy") for _ in range(2)]
    made = [
        in_order(open_engine(some, 3, mixture(0.3)).generate([[5, 6], [7]], Sampling(0, 1.0, 6, 2)))
        for some in (roles[:2], plain)
    ]
    assert made[0] == made[1] and present() == [True, True, False]
    assert len(said) == 3 and all("MiB of frozen weights lie on the host" in text for text in said)


def test_weights_that_are_trained_stay_in_memory_of_their_own(folders):
    group = weakref.WeakSet()
    model, other = (opened(folders("llama"), False, group) for _ in range(2))
    assert not any(on_device(model)) and all(on_device(other))
    trained = model.trainable_full(freeze_head=True)
    with other.on_device():
        pass
    assert len(trained) > 30 and all(p.numel() for _, p in trained)
    storages = [p.untyped_storage() for _, p in trained]
    assert all(s.nbytes() == p.nbytes for s, (_, p) in zip(storages, trained, strict=True))
    plain = opened(folders("llama"))
    assert all(map(torch.equal, (p for _, p in trained), (p for _, p in plain.trainable_full(freeze_head=True))))
    batch = collate(EXAMPLES, 0)
    assert torch.equal(Role(model, "policy").hidden(batch), Role(plain, "policy").hidden(batch))


def test_a_streamed_model_is_sampled_from_by_generate_and_that_is_said_to_be_slow(folders):
    said = list[str]()
    made = []
    for streamed in (None, True):
        engine = open_engine(
            [Role(opened(folders("llama"), streamed), "policy")], 3, settings=Rollout(engine="paged"), say=said.append
        )
        assert streamed is None or type(engine) is HFEngine
        made.append(in_order(engine.generate([[5, 6, 7], [8]], Sampling(0, 1.0, 6, 2))))
    assert made[0] == made[1]
    assert [text for text in said if "slow" in text] == [said[-1]] and "streamed" in said[-1]


def test_with_offload_what_a_block_starts_from_waits_on_the_host(folders, monkeypatch):
    packed = list[torch.Size]()

    def recorded(pin_memory: bool) -> saved_tensors_hooks:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            packed.append(tensor.shape)
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    monkeypatch.setattr(language_model, "save_on_cpu", recorded)
    model = opened(folders("llama"))
    for checkpointing, n in ((True, 0), ("offload", 4)):
        model.checkpointing = checkpointing
        states_and_gradients(model)
        assert packed == [(2, 7, 32)] * n  # the inputs of the blocks, [B, L, d], and nothing from inside


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("quantization", "streamed"), [("none", False), ("none", True), ("nf4", False)])
@pytest.mark.parametrize("checkpointing", [False, True, "offload"])
def test_on_a_gpu_too_the_bits_are_the_same_and_what_left_is_free(folders, quantization, streamed, checkpointing):
    """An NF4 base that is streamed is quantised on the host, whose roundings may be others."""
    gpu = torch.device("cuda")
    plain, model = (
        opened(folders("gemma3"), how, device=gpu, quantization=quantization, dtype="float32", attention="eager")
        for how in (None, streamed)
    )
    assert model.frozen is not None
    plain.checkpointing = model.checkpointing = checkpointing
    expected = states_and_gradients(plain)
    for _ in range(2):
        assert all(map(torch.equal, states_and_gradients(model), expected))
        there = torch.cuda.memory_allocated()
        model.frozen.leave()
        block = max(bundle.size for bundle in model.frozen.bundles)
        assert there - torch.cuda.memory_allocated() >= (block if streamed else model.frozen.size)
