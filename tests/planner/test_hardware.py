"""What a kind of GPU achieves in fp8, in a flash attention, and with experts; and what stands in a node."""

from dataclasses import replace
from pathlib import Path

import pytest
from profiles import PROFILE

from megatron_bfpp.planner.hardware import load_gpu
from megatron_bfpp.planner.model import Gemm

LARGE = Gemm(10**6, 10**6, 10**6)


def gpu_with(folder: Path, more: str):
    path = folder / "mine.yaml"
    path.write_text(PROFILE.replace("bf16: 100", "bf16: 100, fp8: 200").replace("link: 0.5}", f"link: 0.5{more}}}"))
    return load_gpu(str(path))


def test_what_a_profile_does_not_say_is_as_for_matrix_products(tmp_path):
    plain, own = gpu_with(tmp_path, ""), gpu_with(tmp_path, ", matmul_fp8: 0.4, attention: 0.3, experts_ms: 5")
    assert (plain.matmul_fp8, plain.attention, plain.experts_s) == (0.5, 0.5, 0.0)
    assert own.experts_s == pytest.approx(5e-3)
    assert LARGE.flops / own.gemm_s(LARGE, "fp8") == pytest.approx(0.4 * 200e12, rel=1e-3)
    assert LARGE.flops / own.gemm_s(LARGE, "fp8-params") == pytest.approx(0.4 * 200e12, rel=1e-3)
    assert LARGE.flops / own.gemm_s(LARGE, "bf16") == pytest.approx(0.5 * 100e12, rel=1e-3)


def test_a_flash_attention_skips_half_of_the_square_and_goes_back_in_five_products_for_two(tmp_path):
    gpu, square = gpu_with(tmp_path, ", attention: 0.3"), [Gemm(4096, 4096, 64, 8), Gemm(4096, 64, 4096, 8)]
    forward, backward = gpu.square_s(square, "bf16")
    assert forward == pytest.approx(sum(gemm.flops for gemm in square) / 2 / 30e12)
    assert backward == pytest.approx(2.5 * forward)
    forward, backward = replace(gpu, flash_attention=False).square_s(square, "bf16")
    assert forward == pytest.approx(sum(gpu.gemm_s(gemm, "bf16") for gemm in square)) and backward == 2 * forward


def test_calibration_changes_all_achieved_parts_of_a_peak_alike(tmp_path):
    gpu = gpu_with(tmp_path, ", matmul_fp8: 0.4, attention: 0.3").achieving(0.25)
    assert (gpu.matmul, gpu.matmul_fp8, gpu.attention) == pytest.approx((0.25, 0.2, 0.15))


def test_the_members_of_a_group_in_a_node_are_those_of_its_slowest_group(tmp_path):
    gpu = gpu_with(tmp_path, "")
    assert gpu.in_node(1, 4, 64) == 4 and gpu.in_node(2, 4, 64) == 2 and gpu.in_node(1, 8, 64) == 4
    assert gpu.in_node(1, 3, 64) == 1 and gpu.in_node(1, 3, 3) == 3 and gpu.in_node(4, 2, 64) == 1
