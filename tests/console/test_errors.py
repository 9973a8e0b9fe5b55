"""An optional library that is missing is named, with the command that installs it, before any work."""

import sys

import pytest

from megatron_bfpp.console.errors import UserError, require


def test_an_installed_library_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    require("this", "--poem")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("matplotlib", "'megatron-bfpp[report]'"),
        ("scipy", "'megatron-bfpp[report]'"),
        ("wandb", "'megatron-bfpp[wandb]'"),
        ("yaml", "PyYAML"),
        ("no_such_library", "no_such_library"),
    ],
)
def test_a_missing_library_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as raised:
        require(module, "--plot")
    first, second = str(raised.value).splitlines()
    assert first == f"--plot needs {module}, which is not installed."
    assert second == f"  pip install {package}"
