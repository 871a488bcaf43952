"""How products are computed is a field of the config, applied while the run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.recipes.job import open_job
from megatree.recipes.saved import from_plain, to_plain
from tests.recipes.tiny_run import tiny_run, with_group


@pytest.mark.parametrize(("matmul", "narrow"), [("highest", True), ("high", False)])
def test_a_run_computes_products_as_its_config_says(
    tmp_path: Path, matmul: str, narrow: bool
) -> None:
    cfg = tiny_run(tmp_path, steps=1, eval_every=0)
    cfg = with_group(cfg, "precision", matmul=matmul, narrow_sums=narrow)
    assert from_plain(to_plain(cfg)) == cfg
    seen: dict[str, Any] = {}

    def report(kind: str, fields: Any) -> None:
        flag = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        seen[kind] = (torch.get_float32_matmul_precision(), flag)

    ambient = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        open_job(torch.device("cpu"), cfg, report).train()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(ambient)
    assert seen["start"] == seen["step"] == (matmul, narrow)
