"""A repeatable run leaves the process as it was."""

import os

import torch

from qlora_lite.train.determinism import WORKSPACE, deterministic


def test_what_a_repeatable_run_sets_is_put_back(monkeypatch):
    name, needed = WORKSPACE
    for given in (None, ":16:8"):
        monkeypatch.delenv(name, raising=False)
        if given:
            monkeypatch.setenv(name, given)
        with deterministic(True):
            assert os.environ[name] == (given or needed) and torch.are_deterministic_algorithms_enabled()
        assert os.environ.get(name) == given and not torch.are_deterministic_algorithms_enabled()
