"""fastrnn._C with csrc/cuda emulated."""

import pytest

from tests.cuda_emulator import build

pytestmark = pytest.mark.skipif(build.extension_unavailable() is not None, reason=str(build.extension_unavailable()))

STATUS = "import fastrnn._C as library; print(library.__file__, library.cuda_device_count(), library.cuda_status())"


def test_takes_the_place_of_the_module_and_has_one_device() -> None:
    done = build.python("-c", f"import fastrnn; {STATUS}")
    assert done.stdout == f"{build.extension()} 1 ok\n", done.stderr


def test_a_device_that_is_too_old() -> None:
    done = build.python("-c", STATUS, env=build.environment(capability=75))
    assert done.stdout == f"{build.extension()} 0 no device of compute capability 8.0 or later\n", done.stderr


def test_a_wrong_setting_is_named() -> None:
    done = build.python("-c", STATUS, env=build.environment(policy=7))
    assert done.stdout.endswith("FASTRNN_EMULATOR_POLICY must be from 0 to 3, got '7'\n"), done.stderr
