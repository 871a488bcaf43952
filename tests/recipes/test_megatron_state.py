"""Megatron's optimizer, in every place it is kept in: read, written, and refused where it lies."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from megatree.io.formats.arrays import Array, copy
from megatree.io.formats.dcp import DcpReader, DcpWriter
from megatree.io.formats.torch_dist import TorchDistWriter, read_torch_dist
from megatree.models import megatron
from megatree.models.gpt_config import GPTConfig
from megatree.recipes.convert import Options, convert, plan_conversion
from megatree.recipes.formats import open_checkpoint
from megatree.recipes.inspect import differences
from tests.io.formats.in_memory import InMemory, all_of, assert_same
from tests.recipes.foreign import their_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
LLAMA, GPT2 = "llama_tp2_mcore0192", "gpt2_tp2pp2_mcore0192_legacy_plain"
KEYS = ("param", "exp_avg", "exp_avg_sq")
HEAD, TABLE = "output_layer.weight", "embedding.word_embeddings.weight"


def loaded(file: Path) -> Any:
    return torch.load(file, weights_only=False)


def parameters(held: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in held["model"].items() if isinstance(x, Tensor)}


def states(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return a master, a first and a second moment for each weight, functions of it."""
    return {
        name: {"param": w.float(), "exp_avg": w.float() * 0.5, "exp_avg_sq": w.float() ** 2}
        for name, w in weights.items()
    }


def in_buckets(
    weights: Mapping[str, Tensor], key: str, apart: Sequence[str] = (), most: int | None = None
) -> list[Tensor]:
    """Lay a rank's state out as Megatron does: last first, each from a multiple of 64 elements on.

    Compared with buffers that megatron-core 0.16.1 wrote, for one bucket, several, and tied tables.
    """
    buckets: list[list[Tensor]] = [[]]

    def filled() -> int:
        return sum(x.numel() for x in buckets[-1])

    for name in reversed(list(weights)):
        if filled() % 64:
            buckets[-1].append(torch.zeros(64 - filled() % 64))
        if name in apart and buckets[-1]:
            buckets.append([])
        buckets[-1].append(states(weights)[name][key].reshape(-1))
        if name in apart or (most is not None and filled() >= most):
            buckets.append([])
    return [torch.cat(bucket) for bucket in buckets if bucket]


def with_moments(golden: Path, folder: Path) -> Path:
    """Copy a legacy checkpoint, and give it a distributed optimizer beside."""
    shutil.copytree(golden, folder)
    stages = len(list(folder.rglob("mp_rank_00*")))
    for file in folder.rglob("model_optim_rng.pt"):
        held = loaded(file)
        apart = (HEAD, TABLE) if stages > 1 else ()
        flat = {key: torch.cat(in_buckets(parameters(held), key, apart)) for key in KEYS}
        kinds = torch.float32, torch.float32
        told = {**flat, "numel_unpadded": flat["param"].numel()}
        torch.save(
            {"buckets_coalesced": True, 0: {kinds: told}}, file.with_name("distrib_optim.pt")
        )
        held["optimizer"] = {"optimizer": {"param_groups": groups(2.0)}}
        torch.save(held, file)
    return folder


def groups(step: float, **more: Any) -> list[dict[str, Any]]:
    common = {"lr": 0.01, "max_lr": 0.01, "min_lr": 0.001, "betas": (0.9, 0.95), "eps": 1e-8}
    common |= {"step": step, "lr_mult": 1.0, **more}
    return [
        {**common, "wd_mult": 1.0, "weight_decay": 0.1},
        {**common, "wd_mult": 0.0, "weight_decay": 0.0},
    ]


def assert_moments_follow_weights(path: Path) -> None:
    """Fail unless the moments are what `states` makes of the weights."""
    got = all_of(open_checkpoint(path).reader)
    weights = {name.removeprefix("params."): x for name, x in got.items() if "params." in name}
    assert_same(
        {name: x for name, x in got.items() if not name.startswith("params.")},
        {
            **{f"opt.m.{name}": w * 0.5 for name, w in weights.items()},
            **{f"opt.v.{name}": w**2 for name, w in weights.items()},
        },
    )


def test_what_is_read_of_torch_dist_is_written_again_bit_for_bit(
    shared: Path, tmp_path: Path
) -> None:
    """Through our own format: names, shapes, dtypes, bytes, groups and schedule of Megatron's."""
    golden = shared / "goldens/checkpoints" / LLAMA
    convert(str(golden), str(tmp_path / "ours"), Options())
    again = Options(target="torch_dist", box_bytes=50_000)
    convert(str(tmp_path / "ours"), str(tmp_path / "again"), again)
    theirs, told = read_torch_dist(golden)
    ours, said = read_torch_dist(tmp_path / "again")
    assert ours.arrays == theirs.arrays
    assert sorted(ours.blobs) == sorted(set(theirs.blobs) - {"common_state/shard_0_1"})
    assert_same(all_of(ours), all_of(theirs))
    assert said["opt_param_scheduler"] == told["opt_param_scheduler"]
    assert said["iteration"] == told["iteration"]
    assert said["optimizer"]["param_state_sharding_type"] == "fully_reshardable"
    for one, other in zip(
        said["optimizer"]["optimizer"]["param_groups"],
        told["optimizer"]["optimizer"]["param_groups"],
        strict=True,
    ):
        assert one == {**other, "bias_correction": True}
    # Without it Megatron takes the optimizer for one of an older layout.
    assert said["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    lost = {
        "model_type",
        "tokenizer_type",
        "consumed_valid_samples",
        "apply_query_key_layer_scaling",
    }
    assert set(told["args"]) - set(said["args"]) == lost
    changed = {key for key in said["args"].keys() & told["args"].keys()
               if said["args"][key] != told["args"][key]}  # fmt: skip
    assert changed == {"tensor_model_parallel_size", "ckpt_format"}


def test_the_distributed_optimizers_file_is_laid_out_as_megatron_does(
    shared: Path, tmp_path: Path
) -> None:
    golden = shared / "goldens/checkpoints" / LLAMA
    options = Options(target="megatron", tensor=2, vocab_divisor=64, box_bytes=50_000)
    convert(str(golden), str(tmp_path / "legacy"), options)
    reference = f"{LLAMA}_legacy_plain"
    for file in sorted((tmp_path / "legacy").rglob("distrib_optim.pt")):
        theirs = parameters(loaded(next((shared / "goldens/checkpoints" / reference).rglob(
            f"{file.parent.name}/model_optim_rng.pt"))))  # fmt: skip
        held = loaded(file)
        ours = loaded(file.with_name("model_optim_rng.pt"))
        assert list(parameters(ours)) == list(theirs), "the order decides where masters lie"
        assert list(held) == ["buckets_coalesced", 0]
        ((kinds, told),) = held[0].items()
        assert kinds == (torch.float32, torch.float32)
        (flat,) = in_buckets(theirs, "param")
        assert torch.equal(told["param"], flat)
        assert told["numel_unpadded"] == flat.numel()
        assert [tuple(told[key].shape) for key in KEYS] == [tuple(flat.shape)] * 3
        assert ours["optimizer"]["optimizer"]["param_groups"][0]["step"] == 2
        assert ours["opt_param_scheduler"]["num_steps"] == 8
    back = open_checkpoint(tmp_path / "legacy")
    assert list(differences(open_checkpoint(golden), back)) == []
    assert back.extra["skipped"] == 0


def test_tied_tables_of_two_stages_have_buckets_of_their_own(shared: Path, tmp_path: Path) -> None:
    """Read from two tensor and two pipeline ranks, written for those and for others."""
    source = with_moments(shared / "goldens/checkpoints" / GPT2, tmp_path / "source")
    assert_moments_follow_weights(source)
    same = Options(target="megatron", tensor=2, pipeline=2, vocab_divisor=64)
    convert(str(source), str(tmp_path / "same"), same)
    for file in sorted(source.rglob("*.pt")):
        ours, theirs = loaded(tmp_path / "same" / file.relative_to(source)), loaded(file)
        if file.name == "distrib_optim.pt":
            one, two = ours[0].popitem(), theirs[0].popitem()
            assert one[0] == two[0]
            assert_same({k: one[1][k] for k in KEYS}, {k: two[1][k] for k in KEYS})
        else:
            assert_same(parameters(ours), parameters(theirs))
    for target in (replace(same, tensor=4, pipeline=1), Options(target="torch_dist")):
        convert(str(source), str(tmp_path / target.target), target)
        assert_moments_follow_weights(tmp_path / target.target)
        shutil.rmtree(tmp_path / target.target)


@cache
def bucket_tensors(
    source: Path, most: int | None, order: Callable[[Sequence[str]], list[str]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of `dp_reshardable` for a legacy checkpoint, and its arguments."""
    with TemporaryDirectory() as folder:
        options = Options(target="torch_dist", weights_only=True)
        convert(str(source), f"{folder}/whole", options)
        reader, common = read_torch_dist(Path(folder) / "whole")
        tensors = all_of(reader)
    stages = len(list(source.rglob("mp_rank_00*")))
    ranks = len(list(source.rglob("model_optim_rng.pt"))) // stages
    for stage in range(stages):
        for rank in range(ranks):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            weights = parameters(loaded(next(source.rglob(f"{name}/model_optim_rng.pt"))))
            weights = {n: weights[n] for n in order(list(weights))}
            apart = (HEAD, TABLE) if stages > 1 else ()
            for key in KEYS:
                start = f"optimizer.distributed.dp_group_idx_{stage * ranks + rank}.gbuf_idx_0"
                for index, flat in enumerate(in_buckets(weights, key, apart, most)):
                    kinds = "dtype_(torch.float32, torch.float32)"
                    tensors[f"{start}.{kinds}.bucket_idx_{index}.{key}"] = flat
    told = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    return tensors, {**common["args"], **told, "transformer_impl": "local"}


def bucketed(
    source: Path,
    folder: Path,
    *,
    most: int | None,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    order: Callable[[Sequence[str]], list[str]] = list,
    **args: Any,
) -> Path:
    """Write `dp_reshardable` of a legacy checkpoint's tensors, as Megatron's default is."""
    held, told = bucket_tensors(source, most, order)
    tensors = dict(held)
    change(tensors)
    (folder / "buckets").mkdir()
    read = InMemory(tensors)
    writer = TorchDistWriter(folder / "buckets", read.arrays, args={**told, **args}, iteration=2)
    copy(read, writer, most_bytes=8 << 20)
    return folder / "buckets"


@pytest.mark.parametrize(
    ("name", "most"),
    [
        (GPT2, None),
        pytest.param(GPT2, 3000, marks=pytest.mark.full),
        pytest.param(f"{LLAMA}_legacy_plain", None, marks=pytest.mark.full),
        pytest.param(f"{LLAMA}_legacy_plain", 3000, marks=pytest.mark.full),
    ],
)
def test_buckets_of_the_default_layout_are_read(
    name: str, most: int | None, shared: Path, tmp_path: Path
) -> None:
    folder = bucketed(shared / "goldens/checkpoints" / name, tmp_path, most=most)
    opened = open_checkpoint(folder)
    assert opened.unmapped == []
    assert_moments_follow_weights(folder)
    convert(str(folder), str(tmp_path / "ours"), Options())
    assert list(differences(opened, open_checkpoint(tmp_path / "ours"))) == []


def fused_order(names: Sequence[str]) -> list[str]:
    return megatron.in_order(names, fused=True)


@pytest.mark.parametrize(
    "said", [pytest.param("transformer_engine", marks=pytest.mark.full), "local"]
)
def test_the_order_of_transformer_engine_is_told_by_the_masters(
    said: str, shared: Path, tmp_path: Path
) -> None:
    source = shared / "goldens/checkpoints" / GPT2
    folder = bucketed(source, tmp_path, most=None, order=fused_order, transformer_impl=said)
    assert_moments_follow_weights(folder)


def _first(tensors: Mapping[str, Tensor], end: str = "bucket_idx_0.param") -> str:
    return next(name for name in tensors if name.endswith(end))


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "other masters": (
        lambda t: t.update({_first(t): t[_first(t)].roll(1)}), {},
        r"dp_group_idx_0: the masters of \S+ are not its weights: the optimizer is of another run",
    ),
    "a bucket is short": (
        lambda t: [t.update({n: x[:-1]}) for n, x in t.items() if ".bucket_idx_0." in n], {},
        r"its buckets have \d+, 4096 elements, and the parameters of the model do not end there",
    ),
    "a key is absent": (
        lambda t: t.pop(_first(t, "bucket_idx_0.exp_avg")), {}, r"lacks buckets of exp_avg",
    ),
    "buckets of other sizes": (
        lambda t: t.update({_first(t): t[_first(t)][:-64]}), {}, r"its buckets differ between par",
    ),
    "ranks that lie": (
        lambda t: None, {"tensor_model_parallel_size": 4},
        r"has buckets of 4 ranks of the model, and its arguments say 4 tensor times 2 pipeline",
    ),
    "stages that do not divide": (
        lambda t: None,
        {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 4},
        r"its 2 stacked layers do not divide over 4 stages of 1 chunks",
    ),
    "a layout that is not read": (
        lambda t: t.update({"optimizer.distributed.odd": torch.ones(2)}), {},
        r"in a layout that is not read \(optimizer.distributed.odd\). Save it with --dist-ckpt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_buckets_that_are_not_those_of_the_model_are_refused(
    case: str, shared: Path, tmp_path: Path
) -> None:
    change, args, message = BROKEN[case]
    source = shared / "goldens/checkpoints" / GPT2
    folder = bucketed(source, tmp_path, most=None, change=change, **args)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)
    assert open_checkpoint(folder, weights_only=True).unmapped == []


def by_number(held: dict[str, Any], *, masters: bool) -> None:
    """Put the state where the plain optimizer has it: by number, vectors and biases last."""
    weights = parameters(held)
    vectors = [n for n, w in weights.items() if w.dim() == 1 or n.endswith(".bias")]
    order = [[n for n in weights if n not in vectors], vectors]
    state, told, number = {}, groups(2.0), 0
    for group, names in zip(told, order, strict=True):
        group["params"] = list(range(number, number + len(names)))
        for name in names:
            state[number] = {key: states(weights)[name][key] for key in KEYS[1:]}
            state[number]["step"] = torch.tensor(2.0)
            number += 1
    inner = {"state": state, "param_groups": told}
    wide = [[states(weights)[n]["param"] for n in names] for names in order]
    held["optimizer"] = {"optimizer": inner, "fp32_from_fp16_params": wide} if masters else inner


@pytest.mark.parametrize("masters", [False, True])
def test_a_plain_optimizer_is_read_by_the_numbers_of_its_parameters(
    masters: bool, shared: Path, tmp_path: Path
) -> None:
    shutil.copytree(shared / "goldens/checkpoints" / GPT2, tmp_path / "plain")
    for file in (tmp_path / "plain").rglob("*.pt"):
        held = loaded(file)
        by_number(held, masters=masters)
        torch.save(held, file)
    assert_moments_follow_weights(tmp_path / "plain")
    assert open_checkpoint(tmp_path / "plain").extra["step"] == 2
    held["optimizer"].get("optimizer", held["optimizer"])["param_groups"][0]["params"].pop()
    torch.save(held, file)
    with pytest.raises(ValueError, match=r"group 0 of its optimizer has \d+ parameters, the model"):
        open_checkpoint(tmp_path / "plain")


LEGACY: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (
        lambda file: file.unlink(), r"its optimizer is in distrib_optim.pt, which is absent",
    ),
    "too short": (
        lambda file: _edit(file, lambda t: {k: x[:-64] for k, x in t.items() if k in KEYS}),
        r"its buffer 0 has \d+ elements, the parameters of the model take \d+, \d+",
    ),
    "of another run": (
        lambda file: _edit(file, lambda t: {**t, "param": t["param"] + 1}), r"are not its weights",
    ),
    "a key is absent": (
        lambda file: _edit(file, lambda t: {"param": t["param"]}), r"1 buffers with param, not one",
    ),
    "old": (
        lambda file: torch.save({0: {}}, file), r"its buffers are of before February 2024",
    ),
}  # fmt: skip


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    held = loaded(file)
    ((kinds, told),) = held[0].items()
    torch.save({**held, 0: {kinds: change(told)}}, file)


@pytest.mark.parametrize("case", LEGACY)
def test_a_distributed_optimizers_file_that_lies_is_refused(
    case: str, shared: Path, tmp_path: Path
) -> None:
    change, message = LEGACY[case]
    folder = with_moments(shared / "goldens/checkpoints" / GPT2, tmp_path / "x")
    change(sorted(folder.rglob("distrib_optim.pt"))[-1])
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)
    assert open_checkpoint(folder, weights_only=True).unmapped == []


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        (
            "decoder.final_layernorm.weight", 1,
            r"decoder.final_layernorm.weight on rank 1: 1 of 64 elements differ, by 0.5 at most, "
            r"compared with rank 0. Copy the files of all ranks anew",
        ),
        (
            HEAD, 3,
            r"output_layer.weight of tensor rank 1, tied by the arguments: 1 of 4096 elements "
            r"differ, by 0.5 at most, compared with embedding.word_embeddings.weight. Set untie",
        ),
        (
            "decoder.layers.0.self_attention.linear_proj.bias", 1,
            r"decoder.layers.1.self_attention.linear_proj.bias on rank 1: 1 of 64 elements differ",
        ),
    ],
)  # fmt: skip
def test_copies_that_differ_are_refused(
    name: str, at: int, message: str, shared: Path, tmp_path: Path
) -> None:
    """Norms and biases that tensor ranks share; a tied table on the first and the last stage."""
    shutil.copytree(shared / "goldens/checkpoints" / GPT2, tmp_path / "x")
    file = sorted((tmp_path / "x").rglob("model_optim_rng.pt"))[at]
    held = loaded(file)
    held["model"][name].view(-1)[7] += 0.5
    torch.save(held, file)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "x")


def test_masters_that_are_not_those_of_the_weights_are_refused(
    shared: Path, tmp_path: Path
) -> None:
    """As megatron-core 0.16 writes them where several buckets end unaligned: their end is lost."""
    reader, common = read_torch_dist(shared / "goldens/checkpoints" / LLAMA)
    tensors = all_of(reader)
    tensors["optimizer.state.param.embedding.word_embeddings.weight"][-2:] = 0
    read = InMemory(tensors)
    writer = TorchDistWriter(tmp_path, read.arrays, args=common["args"], iteration=2)
    copy(read, writer, most_bytes=8 << 20)
    with pytest.raises(ValueError, match=r"128 of 512 elements in \[120:128, 0:64\] are no mast"):
        open_checkpoint(tmp_path)


def test_moments_of_nobody_knows_what_are_not_written(tmp_path: Path) -> None:
    """Groups of a run of ours are made from its config; without one they would be made up."""
    their_model("llama2").save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options())
    weights = all_of(open_checkpoint(tmp_path / "ours").reader)
    more = {f"opt.{e}.{n[7:]}": x for e in "mv" for n, x in weights.items()}
    cfg = open_checkpoint(tmp_path / "ours").model
    (tmp_path / "named").mkdir()
    read = InMemory({**weights, **more})
    copy(read, DcpWriter(tmp_path / "named", read.arrays))
    assert isinstance(cfg, GPTConfig)
    options = Options(target="megatron", like=cfg, vocab_divisor=1)
    plan = plan_conversion(str(tmp_path / "named"), options)
    assert plan.unmapped == ()
    with pytest.raises(ValueError, match=r"has moments, and does not say of which optimizer"):
        convert(str(tmp_path / "named"), str(tmp_path / "x"), options)
    assert not (tmp_path / "x").exists()
    assert isinstance(DcpReader(tmp_path / "named").arrays["opt.m.embed.table"], Array)
