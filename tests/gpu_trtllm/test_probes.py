"""What the first machine with TensorRT-LLM has to tell: is the interface what was read?"""

import pytest

from actors.engines.trtllm.doctor import machine, package, version
from actors.findings import run_probes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["version", *package(), *machine()])
def test_the_doctor_finds_nothing_bad(name: str) -> None:
    probes = {"version": version, **package(), **machine()}
    (finding,) = run_probes({name: probes[name]})
    print(f"{finding.name}: {finding.text}")
    assert finding.state != "fail", finding.text
