"""The null device itself: what it writes down, and what it refuses."""

import null_device

ACTIONS = """
import json, books, torch

first = torch.ones(1000, device="cuda")
torch.cuda.synchronize()
found = {}
for name, action in {
    "kernel": lambda: first + 1,
    "product": lambda: torch.ones(8, 16, device="cuda") @ torch.ones(16, 4, device="cuda"),
    "reading": lambda: first.sum().item(),
    "writing": lambda: torch.ones(3).to("cuda"),
    "writing pinned": lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "waiting": torch.cuda.synchronize,
    "allocating": lambda: torch.empty(2**30, device="cuda", dtype=torch.uint8),
}.items():
    books.reset()
    action()
    written = books.read()
    found[name] = {entry.kind: entry.count for entry in written if entry.kind != "pinned"}
    found[name]["host"] = written.host_copies()
    if name == "product":
        found["FLOPs"] = sum(entry.amount for entry in written if entry.kind == "gemm")
try:
    torch.empty(200 * 2**30, device="cuda", dtype=torch.uint8)
except torch.OutOfMemoryError:
    found["beyond its memory"] = "refused"
images, weight = torch.ones(2, 3, 8, 8, device="cuda"), torch.ones(5, 3, 3, 3, device="cuda")
books.reset()
found["images"] = torch.nn.functional.conv2d(images, weight, stride=2, padding=1).shape
found["convolution"] = books.read().launches()
print(json.dumps(found))
"""


def test_it_writes_down_what_is_asked_of_it_and_has_as_much_memory_as_a_gpu(compiled):
    found = null_device.run("-c", ACTIONS, compiled=compiled)
    assert found["kernel"] == {"kernel": 1, "host": {}}
    assert found["product"]["gemm"] == 1 and found["FLOPs"] == 2 * 8 * 16 * 4
    assert found["reading"]["sync"] == 1 and found["reading"]["host"] == {"DtoH async": 1}
    assert found["writing"]["sync"] == 1 and found["writing"]["host"] == {"HtoD async": 1}
    assert "sync" not in found["writing pinned"]
    assert found["waiting"] == {"sync": 1, "host": {}}
    assert found["allocating"] == {"malloc": 1, "host": {}}
    assert found["beyond its memory"] == "refused"
    assert found["images"] == [2, 5, 4, 4] and found["convolution"] == 1
