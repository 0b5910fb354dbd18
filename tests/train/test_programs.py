"""What compilation leaves behind."""

import platform
import subprocess
import sys

import pytest

# 200,000 blocks of 600 bytes, of which the last one stays and holds the heap up.
FREED = """
import pathlib, resource
from sephjax.train import programs

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

blocks = [bytearray(600) for _ in range(200_000)]
del blocks[:-1]
before = resident()
programs.give_back_memory()
print(before - resident())
"""


# Elsewhere nothing is given back, as `give_back_memory` says.
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_freed_memory_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREED], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 100e6
