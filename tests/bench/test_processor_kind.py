"""A benchmark names the processor well enough to tell generations apart."""

from __future__ import annotations

from gemma3_export.processor_kind import parse_cpuinfo

ZEN_3 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx2 fma avx512f_lookalike

processor\t: 1
model\t\t: 99
flags\t\t: fpu avx512f
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm sve\nCPU implementer\t: 0x41\n"


def test_family_model_and_instruction_sets_are_those_of_the_first_processor() -> None:
    found = parse_cpuinfo(ZEN_3, otherwise="unused")
    assert str(found) == "AMD EPYC (family 25, model 1; avx2)"


def test_what_the_system_does_not_tell_is_left_out() -> None:
    assert str(parse_cpuinfo(ARM, otherwise="aarch64")) == "aarch64 (asimddp i8mm sve)"
    assert str(parse_cpuinfo("", otherwise="arm64")) == "arm64"
    assert parse_cpuinfo("model : a\ncpu family : ²\n", otherwise="x").family is None
