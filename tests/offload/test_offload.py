"""What goes to host memory comes back as it was, and takes little more room there than it needs."""

import errno
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.errors import OutputError
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.shapes import planning_for
from qlora_lite.offload.offload import MAX_PARTS, HostStore, host_memory, part_sizes

CPU, META = torch.device("cpu"), torch.device("meta")
KIB = 1024


def test_where_no_more_can_be_pinned_ordinary_memory_is_taken_and_said_once(monkeypatch, caplog):
    make, message = torch.empty, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
    left_behind = []

    def refused(*size, pin_memory=False, **options):
        if pin_memory:
            left_behind.append(RuntimeError(message))
            raise left_behind[-1]
        return make(*size, **options)

    def kernel(*size, device):  # raises what a refusal has left behind
        assert device.type == "cuda"
        if left_behind:
            raise left_behind.pop()

    monkeypatch.setattr(torch, "empty", refused)
    monkeypatch.setattr(torch, "ones", kernel)
    for _ in range(2):
        memory = host_memory(100, torch.device("cuda"))
        assert memory.shape == (100,) and memory.device == CPU and not memory.is_pinned() and not left_behind
    (said,) = caplog.messages
    assert "cannot be pinned any more (CUDA error: out of memory)" in said
    message = "CUDA error: OS call failed or operation not supported on this OS"
    assert not host_memory(100, torch.device("cuda")).is_pinned()
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        host_memory(100, torch.device("cuda"))


@given(st.integers(1, 2**40))
def test_parts_are_few_powers_of_two_and_a_fifteenth_too_much_at_most(size):
    sizes = list(part_sizes(size))
    assert len(sizes) <= MAX_PARTS
    assert all(part.bit_count() == 1 for part in sizes)
    assert size <= sum(sizes) <= size * 16 / 15
    assert size.bit_count() > MAX_PARTS or sum(sizes) == size


def test_nothing_takes_no_part():
    assert list(part_sizes(0)) == list(part_sizes(-5)) == []


def tensors_of(seed):
    """Some tensors as a block keeps them: with the strides of attention's results, of several types, one empty."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 40, (2,), generator=generator).tolist()
    hidden = torch.randn(1, *sizes, generator=generator)
    return [
        hidden,
        torch.randn(2, *sizes, 3, generator=generator).bfloat16().transpose(1, 2),
        hidden[0, :, :1].double(),
        torch.empty(0, 3),
        torch.tensor(seed),
        torch.randn(3, generator=generator).expand(2, 3),
        hidden[:, ::2],
    ]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_tensors_of_any_shape_come_back(seed, on_disk, tmp_path, copies):
    store = HostStore(CPU, str(tmp_path) if on_disk else None)
    for step, blocks in itertools.product(range(3), (3, 4)):  # into memory that was taken for others, and more
        given_ = [tensors_of(seed + 10 * step + number) for number in range(blocks)]
        for number, tensors in enumerate(given_):
            store.put(number, tensors)
        for number in reversed(range(blocks)):
            for found, tensor in zip(store.take(number), given_[number], strict=True):
                assert torch.equal(found, tensor) and found.dtype == tensor.dtype


def test_strides_are_kept_and_memory_is_not_shared():
    store, first = HostStore(CPU), torch.randn(2, 3, 5).transpose(0, 2)
    store.put(0, [first])
    store.put(1, [torch.zeros(1)])
    store.take(1)
    (found,) = store.take(0)
    assert torch.equal(found, first) and found.stride() == first.stride() and found.data_ptr() != first.data_ptr()


def test_a_step_that_broke_off_leaves_nothing_behind(copies):
    store, old, new = HostStore(CPU), torch.zeros(4), torch.ones(4)
    for number in range(3):
        store.put(number, [old])
    store.take(2)
    for number in range(2):
        store.put(number, [new])
    assert [store.take(number)[0].sum() for number in (1, 0)] == [4, 4]


def held_bytes(store, where, *sizes):
    """Return the bytes that are held there after steps of two blocks with a tensor of so many bytes each."""
    held = []
    with Ledger() as ledger:
        for size in sizes:
            for number in range(2):
                store.put(number, [torch.empty(size, dtype=torch.uint8, device=store.side.device)])
            for number in (1, 0):
                store.take(number)
            held.append(ledger.now().breakdown.pop(where))
        assert ledger.live_bytes == ledger.now().total == 0 and ledger.peak.total <= 2 * max(sizes)  # on the device
        peaks = ledger.offloaded_peak_bytes, ledger.disk_peak_bytes
        assert sorted(peaks) == [0, held[-1]] and peaks.index(0) == (where == "offloaded")
    return held


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("device", [CPU, META])
def test_of_any_number_of_blocks_the_device_holds_the_tensors_of_two(device, on_disk, tmp_path):
    store, blocks, peaks = HostStore(device, str(tmp_path) if on_disk else None), 6, []
    with Ledger() as ledger:
        for _ in range(2):
            for number in range(blocks):
                store.put(number, [torch.empty(KIB, dtype=torch.uint8, device=device)])
            peaks.append(ledger.peak.total)
            ledger.peaks.clear()
            for number in reversed(range(blocks)):
                store.take(number)
            peaks.append(ledger.peak.total)
            ledger.peaks.clear()
            assert ledger.live_bytes == 0
    assert peaks == 4 * [2 * KIB]


@pytest.mark.parametrize("device", [CPU, META])
def test_host_memory_is_taken_once_and_holds_smaller_batches_too(device):
    assert held_bytes(HostStore(device), "offloaded", 7 * KIB, 7 * KIB, 5 * KIB + 1) == 3 * [14 * KIB]
    assert held_bytes(HostStore(device), "offloaded", 7 * KIB, 8 * KIB + 1) == [14 * KIB, 2 * (8 * KIB + 1)]


def put_all(store, sizes):
    for number, size in enumerate(sizes):
        store.put(number, [torch.full((size,), number, dtype=torch.uint8, device=store.side.device)])


def take_all(store, sizes):
    for number in reversed(range(len(sizes))):
        (found,) = store.take(number)
        assert found.shape == (sizes[number],) and (found.is_meta or (found == number).all())


SAME_SUM = (4, 1, 1, 2), (1, 4, 2, 1), (2,) * 4, (1,) * 8, (5, 3), (8,)  # KiB of the blocks of a step


@pytest.mark.parametrize("is_first_broken_off", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("device", [CPU, META])
def test_no_more_is_held_than_the_largest_step_needs(device, on_disk, is_first_broken_off, tmp_path):
    store = HostStore(device, str(tmp_path) if on_disk else None)
    with Ledger() as ledger:
        for step, blocks in enumerate(SAME_SUM):
            sizes = [KIB * block for block in blocks]
            put_all(store, sizes)
            if step == 0 and is_first_broken_off:
                store.take(len(sizes) - 1)
            else:
                take_all(store, sizes)
            assert ledger.now().breakdown["on disk" if on_disk else "offloaded"] == 8 * KIB


def test_values_stay_where_blocks_of_other_sizes_lay_before(copies):
    store = HostStore(CPU)
    for blocks in (*SAME_SUM, (3, 7, 5), (1, 1, 16), *SAME_SUM):
        put_all(store, [17 * block + 1 for block in blocks])
        take_all(store, [17 * block + 1 for block in blocks])


@pytest.mark.parametrize("device", [CPU, META])
def test_what_lies_in_files_takes_no_host_memory_and_has_no_name(device, tmp_path):
    store = HostStore(device, str(tmp_path))
    assert held_bytes(store, "on disk", 70 * KIB - 1, 50 * KIB, 71 * KIB) == [2 * (70 * KIB - 1)] * 2 + [142 * KIB]
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_or_not_there_is_an_error_that_names_the_setting(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match=r"memory.offload_folder: 1.0 KiB cannot .* No such file .* choose another"):
        HostStore(CPU, str(tmp_path / "nowhere")).put(0, [torch.zeros(KIB // 4)])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left on device"):
        HostStore(CPU, str(tmp_path)).put(0, [torch.zeros(4)])


def test_beside_a_gpu_a_whole_power_of_two_is_taken():
    assert host_memory(5 * KIB, META).untyped_storage().nbytes() == 5 * KIB
    with planning_for("cuda"):
        memory = host_memory(5 * KIB, META)
    assert len(memory) == 5 * KIB and memory.untyped_storage().nbytes() == 8 * KIB
