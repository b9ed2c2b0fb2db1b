"""Training on several processes: equal to one process, in sums, gradients and steps; and what a fault leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimoe.balance import sum_over_ranks
from minimoe.checkpoint import NothingDrawn
from minimoe.errors import ConfigError
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel, next_token_loss
from minimoe.routing import Routing
from minimoe.train.parallel import mesh as meshes
from minimoe.train.parallel.exchange import ShardedExperts, SharedNoise, ep
from minimoe.train.parallel.mesh import clip_gradients, make_mesh, parallelise
from minimoe.train.parallel.save import read_pretrained
from minimoe.train.settings import TrainConfig
from minimoe.train.state import digest
from minimoe.train.step import Balancing, accumulate_gradients, make_optimizer, require_finite
from tests.small import TINY, random_ids, refuses

CONFIG = TINY.replace(num_experts=4, router_aux_loss_coef=0.02)
LAYOUTS = [(1, 2), (2, 1)]
FOUR = [(1, 4), (2, 2), (4, 1)]
LAYOUT = pytest.mark.parametrize(
    ("dp", "experts"),
    [(1, 1), *LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in FOUR)],
)


def on_ranks(world: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each of `world` forked ranks, which have a gloo group on loopback."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run(rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                timeout=timedelta(seconds=120),
            )  # fmt: skip
            results.put((rank, work(*arguments), ""))
            dist.destroy_process_group()
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
        finally:
            os._exit(0)

    ranks = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    found = sorted((results.get() for _ in ranks), key=lambda one: one[0])
    for rank in ranks:
        rank.join()
    (folder / "store").unlink(missing_ok=True)
    for rank, _, fault in found:
        assert not fault, f"rank {rank}: {fault}"
    return [value for _, value, _ in found]


def random_floats(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CONFIG.hidden_size, generator=generator, dtype=torch.float64)


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    pairs = [(name, p, p.grad) for name, p in model.named_parameters()]
    return {n: torch.zeros_like(whole(p)) if g is None else whole(g) for n, p, g in pairs}


def new_model(dtype: torch.dtype = torch.float64, **changes: Any) -> MixtralModel:
    torch.manual_seed(0)
    return MixtralModel(CONFIG.replace(**changes)).to(dtype).train()


def global_loss(model: MixtralModel, ids: Tensor) -> Tensor:
    """Next-token loss [1, T] summed over the tokens of all ranks, of ids that may be none."""
    target = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    loss = next_token_loss(model(ids).logits, target)
    here = (target != -100).sum().double()
    return loss * (here / sum_over_ranks(here).clamp_min(1)).to(loss.dtype)


def uneven(dp: int, experts: int, sizes: list[int], dtype: torch.dtype) -> float:
    """The largest difference between the gradients on ranks with rows of these lengths, and in one process."""
    rows = [random_ids(1, n, seed=n) if n else torch.zeros(1, 0, dtype=torch.int64) for n in sizes]
    model = parallelise(new_model(dtype), make_mesh(dp, experts))
    global_loss(model, rows[dist.get_rank()]).backward()
    norm = clip_gradients(model, 1e9)
    one, total = new_model(dtype), sum(max(0, n - 1) for n in sizes)
    for ids in rows:
        if ids.numel():
            target = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
            loss = next_token_loss(one(ids).logits, target)
            (loss * (ids.numel() - 1) / total).backward()
    expected = torch.nn.utils.clip_grad_norm_(one.parameters(), 1e9)
    assert abs(float(norm - expected)) < 1e-4
    wanted = gradients(one)
    return max(float((g - wanted[name]).abs().max()) for name, g in gradients(model).items())


@LAYOUT
def test_gradients_of_uneven_ranks_are_those_of_one_process(tmp_path, dp, experts) -> None:
    # a rank without tokens takes part in every exchange
    sizes = [0, 30, 10, 7][: dp * experts] if dp * experts > 1 else [30]
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = on_ranks(dp * experts, tmp_path, uneven, dp, experts, sizes, dtype)
        assert max(found) < near


def exchanges() -> list[float]:
    """Differences of y and of its gradients on two ranks of experts, for routers that are even and that are not."""
    mesh, rank, found = make_mesh(1, 2), dist.get_rank(), list[float]()
    everything = [random_floats(n, seed) for seed, n in enumerate((9, 4))]
    for changes, to_one in (({}, False), ({}, True), ({"capacity_factor": 0.5}, False)):
        layers: list[MoELayer] = []
        for _ in range(2):
            torch.manual_seed(1)
            layer = MoELayer(CONFIG.replace(**changes)).double().train()
            if to_one:  # expert 4 for all: the first rank gets nothing
                torch.nn.init.zeros_(layer.gate.weight)  # pyright: ignore
                layer.gate.register_forward_hook(all_on_the_last)
            layers.append(layer)
        one, several = layers
        several.experts = ShardedExperts(several.experts, mesh["ep"])  # pyright: ignore
        several.dispatch = ep
        xs = [x.clone().requires_grad_() for x in everything]
        ys = [one(x)[0] for x in xs]
        torch.cat(ys).square().sum().backward()
        mine = everything[rank].clone().requires_grad_()
        y = several(mine)[0]
        y.square().sum().backward()
        pairs: list[Any] = [(y, ys[rank]), (mine.grad, xs[rank].grad)]
        expected, grads = gradients(one), gradients(several)
        pairs += [(grads[name], expected[name]) for name in grads if name.startswith("experts")]
        found += [float((a - b).abs().max()) for a, b in pairs]
    return found


def all_on_the_last(_: object, __: object, routing: Routing) -> Routing:
    """The same routing with every first choice on expert 4 and no second one."""
    expert = torch.full_like(routing.expert, -1)
    expert[:: routing.k] = 3
    return dataclasses.replace(routing, expert=expert)


def test_an_exchange_is_equal_to_experts_in_one_place(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path, exchanges):
        assert max(found) < 1e-12


def waits() -> list[int]:
    """Reads on the host in one exchange, and in the dispatcher that runs the rows, by itself."""
    layer = MoELayer(CONFIG)
    experts = ShardedExperts(layer.experts, make_mesh(1, 2)["ep"])  # pyright: ignore
    x, counts = random_floats(6, 0).float(), [0]

    def counting(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def counted(tensor: Tensor) -> Any:
            counts[-1] += 1
            return read(tensor)

        return counted

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("tolist", "item"):
            patch.setattr(Tensor, name, counting(getattr(Tensor, name)))
        ep(x, layer.gate(x), experts)
        counts.append(0)
        experts.run(x.repeat(2, 1), torch.arange(12) % 2)
    return counts


def test_an_exchange_waits_for_the_device_once(tmp_path: Path) -> None:
    for both, rows in on_ranks(2, tmp_path, waits):
        assert both == rows + 1


def steps(
    dp: int,
    experts: int,
    changes: dict[str, Any],
    parts: int,
    several: int,
    dtype: torch.dtype = torch.float64,
    epsilon: float = 1e-8,
) -> list[list[float]]:
    """Losses, norms and at the end all weights of some steps on ranks, or in one process that has all rows."""
    world = dp * experts
    model = new_model(dtype, **{"num_hidden_layers": 1, **changes})
    if dist.is_initialized():
        parallelise(model, make_mesh(dp, experts))
    config = TrainConfig(steps=20, batch_size=8, seq_len=12, lr=3e-3, warmup=2, clip=0.5)
    optimizer, balancing = make_optimizer(model, config), Balancing(model)
    for group in optimizer.param_groups:
        group["eps"] = epsilon
    noise = SharedNoise if dist.is_initialized() else contextlib.nullcontext
    found: list[list[float]] = []
    for step in range(several):
        ids = random_ids(config.batch_size, config.seq_len, seed=step)
        if dist.is_initialized():
            batch = [part.chunk(world)[dist.get_rank()] for part in ids.chunk(parts)]
        else:  # capacity is defined for a rank's tokens
            batch = ids.chunk(parts * (world if model.config.capacity_factor else 1))
        with noise():
            scope = bool(model.config.capacity_factor)
            seen = accumulate_gradients(model, batch, seed=step, global_balance=scope)
        if dist.is_initialized():
            norm = clip_gradients(model, config.clip)
        else:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        require_finite(seen, norm)
        optimizer.step()
        optimizer.zero_grad()
        balancing.step(seen.counts, config.step_tokens)
        found.append([float(norm), *map(float, seen.losses.values())])
    state = [whole(value).double().flatten() for value in model.state_dict().values()]
    return [*found, torch.cat(state)[::7].tolist()]  # enough of them to see a difference


RECIPES: dict[str, dict[str, Any]] = {
    "top_k": {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "router_jitter_noise": 0.1},
    "capacity": {"router_type": "switch", "num_experts_per_tok": 1, "capacity_factor": 1.0},
    "bias": {"router_type": "sigmoid", "router_bias_update_rate": 0.01, "router_aux_loss_type": "sequence"},
    "expert_choice": {"router_type": "expert_choice", "router_aux_loss_type": "none"},
    "noise": {"router_type": "noisy_top_k", "router_aux_loss_coef": 0.1},
}  # fmt: skip


def all_recipes(dp: int, experts: int, several: int) -> dict[str, Any]:
    parts = {name: 1 + (name == "top_k") for name in RECIPES}
    return {n: steps(dp, experts, RECIPES[n], parts[n], several) for n in RECIPES}


@pytest.mark.parametrize(
    ("dp", "experts", "several"),
    # the warm-up of two steps, a bias that has moved, moments that divide by those of several steps
    [(1, 2, 5), *(pytest.param(*layout, 20, marks=pytest.mark.slow) for layout in LAYOUTS + FOUR)],
)
def test_steps_are_those_of_one_process(tmp_path, dp, experts, several) -> None:
    for found in on_ranks(dp * experts, tmp_path, all_recipes, dp, experts, several):
        for name, expected in all_recipes(dp, experts, several).items():
            for ours, theirs in zip(found[name], expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6), name


@pytest.mark.slow
def test_only_adams_epsilon_parts_two_layers_in_float32_from_one_process(tmp_path: Path) -> None:
    # where a first gradient is as small as ε, the step lr · g / (|g| + ε) enlarges its rounding error by up to lr / ε
    changes = RECIPES["top_k"] | {"num_hidden_layers": 2}
    for epsilon, near in ((1e-8, 1e-4), (1e-4, 1e-6)):
        expected = steps(1, 2, changes, 2, 20, torch.float32, epsilon)
        for found in on_ranks(2, tmp_path, steps, 1, 2, changes, 2, 20, torch.float32, epsilon):
            for ours, theirs in zip(found, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6, abs=near)


class Alive(TorchDispatchMode):
    """The most bytes that tensors on the CPU have held at once within, of those that torch's operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.most = dict[Any, tuple[StorageWeakRef, int]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            value = value._local_tensor if isinstance(value, DTensor) else value
            if isinstance(value, Tensor) and not value.is_meta:
                storage = value.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: one for key, one in self.held.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out


def made_in_shards(dp: int, experts: int, changes: dict[str, Any], folder: Path) -> Any:
    """Tensors unlike those of one process, of a model that is drawn and one that is read; the most bytes held."""
    config, mesh = CONFIG.replace(**changes), make_mesh(dp, experts)
    unlike, most = list[str](), list[int]()
    for read in (False, True):
        torch.manual_seed(0)
        with Alive() as alive, NothingDrawn() if read else contextlib.nullcontext():
            model = parallelise(config, mesh)
            if read:
                read_pretrained(model, folder)
        most.append(alive.most)
        torch.manual_seed(0)
        one = MixtralModel.from_pretrained(folder) if read else MixtralModel(config)
        state = model.state_dict()
        theirs = one.state_dict()
        unlike += [name for name, v in theirs.items() if not torch.equal(v, whole(state[name]))]
        assert digest(model) == digest(one)
    return unlike, most


@pytest.mark.parametrize(
    ("dp", "experts", "changes"),
    [
        (1, 2, {"num_experts": 8, "num_hidden_layers": 4}),
        (2, 1, {"router_type": "hash", "tie_word_embeddings": True, "num_hidden_layers": 6}),
    ],
)
def test_a_rank_makes_its_shards_and_never_the_whole_model(tmp_path, dp, experts, changes) -> None:
    model, folder = new_model(torch.float32, **changes), tmp_path / "model"
    model.save_pretrained(folder, layout="minimoe" if "router_type" in changes else "huggingface")
    everything = sum(value.nbytes for value in model.parameters())
    ends = sum(p.nbytes for p in {model.embed_tokens.weight, model.lm_head.weight})
    block = sum(value.nbytes for value in model.layers[0].parameters())
    for unlike, most in on_ranks(2, tmp_path, made_in_shards, dp, experts, changes, folder):
        assert unlike == []
        # its half, a block and the vocabulary whole, and tables of a few kilobytes
        assert max(most) < everything / 2 + block + ends + 20_000 < everything


def compiled() -> float:
    """The largest difference between the gradients of a model on two ranks, compiled and as it is."""
    mesh, ids, found = make_mesh(1, 2), random_ids(2, 12, seed=dist.get_rank()), list[Any]()
    for backend in ("aot_eager", None):
        model = parallelise(new_model(), mesh)
        call = torch.compile(model, backend=backend) if backend else model
        call(ids, labels=ids).loss.backward()
        found.append(gradients(model))
    return max(float((g - found[1][name]).abs().max()) for name, g in found[0].items())


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients(tmp_path: Path) -> None:
    assert max(on_ranks(2, tmp_path, compiled)) < 1e-12


@pytest.mark.parametrize(
    ("changes", "layout", "words"),
    [
        ({}, (1, 3), "ep is 3, which does not divide num_experts = 4"),
        ({}, (1, 8), "ep is 8, but there are 4 experts"),
        ({}, (5, 1), "dp is 5; it has to divide"),
        ({"router_type": "soft"}, (1, 2), "router_type 'soft' is not trained on several ranks"),
        ({"router_aux_loss_type": "importance"}, (1, 2), "router_aux_loss_type 'importance'"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes, layout, words) -> None:
    refuses(ConfigError, words, meshes.check_layout, CONFIG.replace(**changes), *layout)


@pytest.mark.parametrize("kind", ["base", "sinkhorn", "uniform", "round_robin"])
def test_a_router_that_needs_all_tokens_is_refused(kind: str) -> None:
    k = 1 if kind == "base" else 2
    gate: Any = MoELayer(CONFIG.replace(router_type=kind, num_experts_per_tok=k)).gate
    refuses(
        ConfigError, f"router_type '{kind}' chooses by all tokens", meshes.check_router, gate, kind
    )
