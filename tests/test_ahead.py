"""What is read from a compiled program, and names of topologies."""

import types

import pytest

from sephjax.ahead import account, chips, run
from sephjax.errors import UserError
from tests.tiny import refused

# As XLA writes them: a tuple result, a started pair, layouts and tilings of a TPU, a fused name.
TEXT = """
  %all-reduce.1 = (f32[2,3]{1,0:T(8,128)}, bf16[4]{0}) all-reduce(%a, %b), channel_id=1
  %ar = f32[]{:T(256)} all-reduce-start(%c), to_apply=%add
  %done = f32[]{:T(256)} all-reduce-done(%ar)
  %all-gather.7 = s32[8,5]{1,0} all-gather(%d), dimensions={0}
  %fusion.all-reduce = f32[9]{0} fusion(%e), kind=kLoop, calls=%all-reduce-scatter
"""


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    found = account.collectives(TEXT)
    assert found == [("all-reduce", 32), ("all-reduce", 4), ("all-gather", 160)]
    assert account.summed(found) == {
        "all-reduce": {"count": 2, "bytes": 36},
        "all-gather": {"count": 1, "bytes": 160},
    }


def test_a_peak_is_arguments_results_and_temporaries():
    stats = types.SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=7,
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: stats)
    assert account.memory(compiled) == account.Memory(100, 10, 7, 117)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("RESOURCE_EXHAUSTED: x Used 17.1G of 15.75G hbm. Exceeded", "Used 17.1G of 15.75G hbm"),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (17.00G) exceeds available HBM (15.75G).",
            "temporaries of 17.00G in 15.75G",
        ),
        ("RESOURCE_EXHAUSTED: something else\nand more", "RESOURCE_EXHAUSTED: something else"),
    ],
)
def test_what_libtpu_refuses_is_told_in_few_words(said, words):
    assert run._memory_words(said) == words


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:0x4", "h100:eight", "v5e:2x4x", "h100:2x8"])
def test_a_topology_that_is_none_is_refused(name):
    with pytest.raises(UserError, match=f"--topology={name} is none"):
        chips.topology(name)


@pytest.mark.parametrize(("group", "least"), [(3, 3), (16, 2)])
def test_a_batch_that_groups_do_not_divide_is_refused_before_compiling(group, least):
    run._check_groups(group, least, 8)
    said = f"makes 8 images on 8 chips, .*sample_group={group} .*a multiple of {least}"
    with pytest.raises(UserError, match=said):
        run._check_groups(group, 1, 8)


def rows(*peaks):
    found = []
    for images, peak in peaks:
        spent = {"peak": peak} if peak else {}
        found.append({"images": images, "fits": bool(peak), "memory_bytes": spent})
    return found


@pytest.mark.parametrize(
    ("peaks", "compiled", "estimated"),
    [
        ([(1, 3), (2, 5), (4, 9)], 4, 7),  # 2 an image and 1 besides, 16 at hand
        ([(1, 3), (2, 5), (4, 9), (8, 0)], 4, 7),
        ([(1, 3), (2, 5), (6, 0)], 2, 5),  # refused at 6 although the line says 7
        ([(1, 3)], 1, 1),
        ([(1, 0)], 0, 0),
    ],
)
def test_the_largest_batch_that_fits(peaks, compiled, estimated):
    found = run._largest(rows(*peaks), chips.Chip("tpu", 16, 1))
    assert found == {"compiled": compiled, "estimated": estimated}


def test_of_a_gpu_no_largest_batch_is_guessed():
    found = run._largest(rows((1, 3), (2, 3)), chips.Chip("cuda", 16, 1))
    assert found == {"compiled": 2, "estimated": None}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--topology=v5e",), "--topology=v5e is none"),
        ((), "--mode=compile needs --topology"),
        (("--topology=v5e:2x4", "--program=both"), "--program=both is none"),
        (("--topology=v5e:2x4", "--chip_batches=1,x"), "--chip_batches=1,x must be numbers"),
    ],
)
def test_a_wrong_command_is_one_sentence(words, said):
    assert said in refused("--config=configs/demo.py", "--mode=compile", *words)


def test_a_batch_is_cut_into_whole_micro_batches():
    run._check_parts(4, 8)
    with pytest.raises(UserError, match="--chip_batches=6 cannot be cut into"):
        run._check_parts(4, 6)
