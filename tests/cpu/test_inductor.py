"""Inductor's own Triton code on a CPU: `torch.compile` with `torch._inductor.config.cpu_backend = "triton"`.

Expected values are eager torch's, of a copy of the model. Every test also looks at the generated code: were the models
silently compiled to C++, it would say nothing about Triton.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch._inductor.config as inductor
import triton
import triton.language as tl
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn import functional as F

# torch's own modules, which Inductor imports when it first compiles, use torch.jit.
pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"), pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _inductor_on_triton():
    torch._dynamo.reset()
    with fresh_cache(), inductor.patch(cpu_backend="triton", compile_threads=1):
        yield
    torch._dynamo.reset()


@pytest.fixture
def untuned():
    """One configuration of each kernel instead of the two or three that are tried, of which one is then compared."""
    with inductor.patch({"triton.autotune_pointwise": False}):
        yield


class Block(nn.Module):
    """A transformer block: causal attention and a feed-forward layer, each normalised before and added."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * (width // self.heads) ** -0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class ResNet(nn.Module):
    """Convolutions, batch normalisation, a residual, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 2)
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.head(F.relu(x + y).mean((2, 3)))


class LanguageModel(nn.Module):
    """Embedding, block, cross-entropy of the next token."""

    def __init__(self, tokens: int = 37, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(tokens, width), Block(width), nn.Linear(width, tokens)

    def forward(self, text):
        logits = self.head(self.block(self.embedding(text)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


def compiled_output(function, *inputs):
    """What the compiled function returns; every kernel that Inductor wrote for it is Triton's."""
    output, sources = run_and_get_code(function, *inputs)
    assert any("@triton.jit" in source for source in sources)
    assert not any("async_compile.cpp" in source for source in sources)
    return output


def agree(model: nn.Module, *inputs: torch.Tensor, tolerance: float = 2e-4, **options: object) -> None:
    """Output, gradients and buffers of the compiled model are those of its eager copy."""
    eager = copy.deepcopy(model)
    expected = eager(*inputs)
    output = compiled_output(torch.compile(model, fullgraph=True, **options), *inputs)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), other in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad, parameter.grad, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    for mine, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_an_mlp_forward_and_backward():
    agree(
        nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)),
        torch.randn(17, 30),
    )


def test_a_transformer_block_forward_and_backward():
    agree(Block(), torch.randn(2, 19, 32))


@pytest.mark.usefixtures("untuned")
def test_a_residual_network_forward_and_backward():
    agree(ResNet(), torch.randn(4, 3, 12, 12), tolerance=1e-3)


def test_a_network_in_evaluation():
    model = ResNet().eval()
    image = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(compiled_output(torch.compile(model), image), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.usefixtures("untuned")
def test_a_model_in_bfloat16():
    agree(Block().bfloat16(), torch.randn(2, 7, 32, dtype=torch.bfloat16), tolerance=6e-2)


@pytest.mark.usefixtures("untuned")
def test_one_compilation_serves_many_shapes():
    model = Block()
    function = torch.compile(model, dynamic=True)
    with torch.no_grad():
        compiled_output(function, torch.randn(2, 5, 32))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, length in ((2, 19), (3, 4), (7, 33)):
                x = torch.randn(batch, length, 32)
                torch.testing.assert_close(function(x), model(x), atol=2e-4, rtol=2e-4)


@pytest.mark.usefixtures("untuned")
def test_training_follows_eager_step_by_step():
    model = LanguageModel()
    eager = copy.deepcopy(model)
    function = torch.compile(model)
    optimizers = torch.optim.SGD(model.parameters(), 0.5), torch.optim.SGD(eager.parameters(), 0.5)
    step = torch.compile(optimizers[0].step)
    text = torch.randint(37, (4, 20))
    losses = []
    for _ in range(4):
        for forward, optimizer, update in ((function, optimizers[0], step), (eager, optimizers[1], optimizers[1].step)):
            optimizer.zero_grad()
            loss = forward(text)
            loss.backward()
            update()
            losses.append(loss.item())
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-4)
    assert losses[-1] < losses[0]


def test_dropout_drops_the_share_it_says_and_scales_the_rest():
    function = torch.compile(lambda x: F.dropout(x, 0.25))
    output = compiled_output(function, torch.ones(64, 1000))
    dropped = (output == 0).double().mean().item()
    assert dropped == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / output.numel()) ** 0.5)
    assert torch.equal(output[output != 0].unique(), torch.tensor([1 / 0.75]))
    assert not torch.equal(output, function(torch.ones(64, 1000)))


def test_reductions_scans_indices_and_casts():
    def function(x, index):
        gathered = x.gather(1, index)
        scattered = torch.zeros_like(x).scatter_add(1, index, gathered)
        joined = F.pad(torch.cat([x, gathered], 1), (1, 2)).roll(1, 1)
        return (
            x.softmax(-1) + x.log_softmax(0),
            x.cumsum(1),
            x.var(1),
            (x.argmax(-1), x.argmin(0), (x > 0).any(-1), (x > -9).all(0)),
            scattered,
            joined.flip(0),
            (x * 9).to(torch.int64) // 4,
            torch.remainder((x * 9).to(torch.int32), 5),
            x.double().logsumexp(-1),
            torch.erf(x) + torch.sigmoid(x) * torch.sin(x),
            torch.where(x > 0, x, torch.nan).nan_to_num(7.0),
        )

    x, index = torch.randn(9, 37), torch.randint(37, (9, 37))
    torch.testing.assert_close(
        compiled_output(torch.compile(function), x, index), function(x, index), atol=1e-5, rtol=1e-5
    )


def test_an_index_out_of_bounds_is_an_exception():
    function = torch.compile(lambda table, index: table[index] + 1)
    table = torch.randn(10, 4)
    torch.testing.assert_close(compiled_output(function, table, torch.tensor([3, -1])), table[[3, -1]] + 1)
    with pytest.raises(AssertionError, match="index out of bounds"):
        function(table, torch.tensor([3, 10]))


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n) * 2, mask=offsets < n)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_a_kernel_of_the_user_is_part_of_a_compiled_function(backend):
    def function(x):
        y = torch.empty_like(x)
        double[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64)
        return (y + 1).relu()

    x = torch.randn(7, 50)
    with inductor.patch(cpu_backend=backend):
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), (2 * x + 1).relu())


def test_inductors_worker_processes_compile_too(tmp_path):
    """Its pool of compiling processes is the default: all that a user sets is the backend's name."""
    program = (
        "import torch, torch._inductor.config as config\n"
        "config.cpu_backend = 'triton'\n"
        "config.compile_threads = 2\n"
        "x = torch.randn(33, 70)\n"
        "torch.testing.assert_close(torch.compile(lambda x: x.softmax(-1).sin())(x), x.softmax(-1).sin())\n"
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
