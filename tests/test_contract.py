"""What every op owes, tested once over the whole table: a row that lacks something fails here."""

from __future__ import annotations

import importlib
import importlib.resources
import warnings

import pytest
import torch
from torch import Tensor

import fastdiff_kernels
from fastdiff_kernels import _backends, _choices, _companions, _loader
from fastdiff_kernels._registry import OPS, Op, overload

from . import other_torch
from .helpers import outputs_of

FAMILIES = sorted({op.family for op in OPS.values()})
SAMPLES = {name: make for family in FAMILIES for name, make in importlib.import_module(f"tests.samples.{family}").SAMPLES.items()}
CALLS = [
    pytest.param(op, index, id=f"{name}-{index}") for name, op in OPS.items() for index in range(len(SAMPLES[name](torch.float64, "cpu")))
]
DIFFERENTIABLE = [c for c in CALLS if c.values[0].differentiable]
COMPILED = [c for c in DIFFERENTIABLE if c.values[1] == 0]


def sample(op: Op, index: int, dtype: torch.dtype = torch.float64) -> list:
    return list(SAMPLES[op.name](dtype, "cpu")[index])


def with_gradients(op: Op, args: list) -> tuple[list, list[int]]:
    """args whose differentiable tensors are leaves that require grad, and the places of those."""
    places = [i for i, name in enumerate(op.arguments) if name in op.differentiable and isinstance(args[i], Tensor)]
    return [a.detach().requires_grad_() if i in places else a for i, a in enumerate(args)], places


def restricted(fn, args: list, places: list[int]):
    """fn as a function of the arguments at those places alone."""

    def of_places(*tensors: Tensor):
        full = list(args)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        return fn(*full)

    return of_places


def call_of(op: Op):
    return overload(op).default


def primary(op: Op, fn):
    """fn without its auxiliary outputs, which have no derivative."""

    def of_primary(*args):
        outputs = outputs_of(fn(*args))
        return tuple(outputs[i] for i in op.primary)

    return of_primary


def test_the_compiled_library_is_loaded():
    assert _loader.load() is None


def test_every_op_is_public_and_documented():
    public = {name: getattr(fastdiff_kernels.ops, name) for name in fastdiff_kernels.ops.__all__}
    for op in OPS.values():
        function = public[op.name.removesuffix("_seeded")]
        assert function.__module__ == f"fastdiff_kernels.ops.{op.family}"
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in function.__doc__, f"{op.name} lacks {section}"


@pytest.mark.parametrize("op", _companions.TABLE.values(), ids=lambda op: op.name)
def test_every_kernel_of_the_table_exists(op: Op):
    assert _backends.missing_cpu_kernel(op) is None
    if "triton" in op.kernels:
        source = (importlib.resources.files("fastdiff_kernels") / "triton" / f"{op.family}.py").read_text()
        assert f"def {op.name}(" in source
    if "cuda" in op.kernels and _loader.build_report().get("cuda"):
        assert _backends.has_kernel(f"fastdiff_cuda::{op.name}", "CUDA")


@pytest.mark.parametrize(("op", "index"), CALLS)
def test_opcheck(op: Op, index: int):
    args, _ = with_gradients(op, sample(op, index))
    torch.library.opcheck(call_of(op), tuple(args))


@pytest.mark.parametrize(("op", "index"), DIFFERENTIABLE)
def test_derivatives(op: Op, index: int):
    """First and second derivatives, reverse and forward mode, plain and batched, against finite differences."""
    args, places = with_gradients(op, sample(op, index))
    fn, leaves = restricted(primary(op, call_of(op)), args, places), [args[i] for i in places]
    stopped = bool(op.stopped)
    torch.autograd.gradcheck(
        fn, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=not stopped, fast_mode=True
    )
    torch.autograd.gradgradcheck(fn, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(("op", "index"), DIFFERENTIABLE)
def test_torch_func_agrees_with_the_definition(op: Op, index: int):
    """grad, jvp, Hessian-vector product and vmap of the op equal those of its definition: no tangent is dropped."""
    args, places = with_gradients(op, sample(op, index))
    primals = tuple(args[i].detach() for i in places)
    tangents = tuple(torch.randn_like(p) for p in primals)

    def scalar(fn):
        return lambda *tensors: sum(o.sin().sum() for o in restricted(primary(op, fn), args, places)(*tensors))

    def hessian_product(fn):
        return torch.func.jvp(torch.func.grad(scalar(fn), argnums=tuple(range(len(places)))), primals, tangents)

    for actual, expected in zip(hessian_product(call_of(op)), hessian_product(op.reference), strict=True):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
    _, actual = torch.func.jvp(restricted(call_of(op), args, places), primals, tangents)
    _, expected = torch.func.jvp(restricted(op.reference, args, places), primals, tangents)
    for a, e in zip(outputs_of(actual), outputs_of(expected), strict=True):
        torch.testing.assert_close(a, e)
        assert e.abs().max() > 0
    stacked = tuple(torch.stack((p, 2 * p)) for p in primals)
    batched = torch.vmap(torch.func.grad(scalar(call_of(op))))(*stacked)
    torch.testing.assert_close(batched[1], torch.func.grad(scalar(op.reference))(*[2 * p for p in primals]))


@pytest.mark.parametrize(("op", "index"), CALLS)
def test_backends_agree(op: Op, index: int):
    """The CPU kernel equals the definition in float64, gradients included."""
    args, places = with_gradients(op, sample(op, index))

    def run() -> list[Tensor]:
        outputs = outputs_of(call_of(op)(*args))
        if not places:
            return list(outputs)
        differentiable = [outputs[i].sin().sum() for i in op.primary]
        return [*outputs, *torch.autograd.grad(differentiable, [args[i] for i in places], materialize_grads=True)]

    with fastdiff_kernels.backend("reference"):
        expected = run()
    for actual, definition in zip(run(), expected, strict=True):
        # The seeded normals are float32 values, equal to 2 ulp.
        tolerance = 1e-6 if "seed" in op.arguments else 1e-12
        torch.testing.assert_close(actual, definition, rtol=tolerance, atol=tolerance)


def test_every_kernel_equals_its_definition_in_this_torch_as_in_others(capsys):
    """Companions called by themselves as well: what a library is asked that was taken to another torch."""
    other_torch.main()
    assert f"calls of {len(_companions.TABLE)} ops equal their definitions" in capsys.readouterr().out


@pytest.mark.parametrize(("op", "index"), COMPILED)
def test_compiles_without_a_graph_break(op: Op, index: int):
    args, places = with_gradients(op, sample(op, index, torch.float32))

    def step(*tensors):
        return outputs_of(restricted(call_of(op), args, places)(*tensors))

    leaves = [args[i] for i in places]
    plain, compiled = step(*leaves), torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    for p, c in zip(plain, compiled, strict=True):
        torch.testing.assert_close(c, p, rtol=0, atol=0)
    totals = ([outputs[i].sum() for i in op.primary] for outputs in (plain, compiled))
    for p, c in zip(*(torch.autograd.grad(total, leaves, materialize_grads=True) for total in totals), strict=True):
        torch.testing.assert_close(c, p, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "index"), COMPILED)
def test_forward_mode_inside_a_compiled_graph(op: Op, index: int):
    args, places = with_gradients(op, sample(op, index))
    fn = restricted(call_of(op), args, places)
    primals = tuple(args[i].detach() for i in places)
    tangents = tuple(torch.randn_like(p) for p in primals)
    compiled = torch.compile(lambda p, t: torch.func.jvp(fn, p, t)[1], fullgraph=True, backend="aot_eager")
    for a, e in zip(outputs_of(compiled(primals, tangents)), outputs_of(torch.func.jvp(fn, primals, tangents)[1]), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("op", [op for op in OPS.values() if not op.differentiable and not op.stopped], ids=lambda op: op.name)
def test_inference_only_ops_refuse_gradients(op: Op):
    args = sample(op, 0)
    args[0] = args[0].detach().requires_grad_()
    with pytest.raises(ValueError, match="must not require grad"):
        call_of(op)(*args)
    with torch.no_grad():
        call_of(op)(*args)


@pytest.mark.parametrize(("op", "index"), COMPILED)
def test_constants_refuse_gradients(op: Op, index: int):
    """A tensor that has no gradient is refused rather than given none in silence."""
    args = sample(op, index)
    for i, name in enumerate(op.arguments):
        constant = isinstance(args[i], Tensor) and args[i].is_floating_point() and name not in (*op.differentiable, *op.stopped)
        if constant:
            with pytest.raises(ValueError, match=f"{name} must not require grad"):
                call_of(op)(*[a.detach().requires_grad_() if j == i else a for j, a in enumerate(args)])


@pytest.mark.parametrize(("op", "index"), COMPILED)
def test_runs_alike_under_autocast(op: Op, index: int):
    """Autocast changes no input and no output: what dtype a network runs in is the network's affair."""
    args = sample(op, index, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = outputs_of(call_of(op)(*args))
    for a, e in zip(outputs, outputs_of(call_of(op)(*args)), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "index"), CALLS)
def test_runs_alike_in_inference_mode(op: Op, index: int):
    args = sample(op, index)

    def run() -> tuple[Tensor, ...]:
        by_kernel = outputs_of(call_of(op)(*args))
        with fastdiff_kernels.backend("reference"):
            return (*by_kernel, *outputs_of(call_of(op)(*args)))

    expected = run()
    with torch.inference_mode():
        found = run()
    for f, e in zip(found, expected, strict=True):
        assert f.is_inference()
        torch.testing.assert_close(f, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["denoising_loss", "group_norm_silu"])
def test_fake_gradients_have_the_layout_of_the_real_ones(name: str):
    """Compiled code relies on strides: channels_last is kept where the row says so, and made contiguous elsewhere."""
    op = OPS[name]
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    args = [x, 2, None, None, None, None, 1e-5, "silu"] if name == "group_norm_silu" else [x, x.clone(), torch.ones(1)]
    needs = [True, *[False] * (len(op.differentiable) - 1)]
    backward = getattr(torch.ops.fastdiff, f"{name}_backward").default
    outputs = outputs_of(call_of(op)(*args))
    call = (torch.ones_like(outputs[0]), *args, *(outputs[i] for i in op.saved))
    real = outputs_of(backward(*call, needs))[0]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call]
        fake = outputs_of(backward(*fakes, needs))[0]
    assert fake.stride() == real.stride()


@pytest.mark.parametrize(("op", "index"), CALLS)
def test_cost_model(op: Op, index: int):
    """Bytes are one read of every tensor and one write of every output; operations are counted."""
    args = sample(op, index)
    tensors = [t for t in (*args, *outputs_of(call_of(op)(*args))) if isinstance(t, Tensor)]
    assert op.bytes(*args) == sum(t.numel() * t.element_size() for t in tensors)
    assert op.flops(*args) > 0


def test_a_forced_backend_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2)
    with fastdiff_kernels.backend("triton"), pytest.raises(RuntimeError, match="cannot run lcss_noise: the tensors are on cpu"):
        fastdiff_kernels.ops.lcss_noise(x, 0)
    with fastdiff_kernels.backend("cuda"), pytest.raises(RuntimeError, match="the tensors are on cpu"):
        fastdiff_kernels.ops.lcss_noise(x, 0)
    with pytest.raises(ValueError, match="name must be one of reference, cpu, triton, cuda, sdpa; got 'gpu'"):
        fastdiff_kernels.backend("gpu")


def test_the_innermost_backend_decides(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 5)
    with fastdiff_kernels.backend("triton"):
        with fastdiff_kernels.backend("reference"):
            expected = fastdiff_kernels.ops.denoising_loss(x, 2 * x)
        with fastdiff_kernels.backend("cpu"):
            torch.testing.assert_close(fastdiff_kernels.ops.denoising_loss(x, 2 * x), expected)
        with pytest.raises(RuntimeError, match=r"backend\('triton'\) cannot run denoising_loss"):
            fastdiff_kernels.ops.denoising_loss(x, 2 * x)


def test_explain_names_the_backend_and_the_refusals():
    text = fastdiff_kernels.explain(fastdiff_kernels.ops.lcss_noise, torch.zeros(1, 2), 0)
    assert text.startswith("lcss_noise: cpu (")
    assert "cuda: the tensors are on cpu" in text


def test_explain_names_the_row_of_the_table_that_decided(monkeypatch):
    size = (0, float("inf"))
    row = _choices.Choice("attention", "cpu", "eager", size, size, "cpu", "made up", 7)
    monkeypatch.setattr(_choices, "choose", lambda op, *_: row if op == "attention" else None)
    q = torch.zeros(1, 2, 1, 4)
    text = fastdiff_kernels.explain(fastdiff_kernels.ops.attention, q, q, q)
    assert text.startswith("attention: cpu by line 7 of choices.csv (made up) (")
    assert fastdiff_kernels.explain(fastdiff_kernels.ops.lcss_noise, torch.zeros(1, 2), 0).startswith("lcss_noise: cpu (")


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_explain_names_a_forced_backend(name: str):
    loss, args = fastdiff_kernels.ops.denoising_loss, torch.randn(2, 2, 5).unbind()

    def forcing():
        with fastdiff_kernels.backend(name):
            loss(*args)

    forced = f"denoising_loss: {name} (forced by backend('{name}'))"
    assert fastdiff_kernels.explain(forcing) == forced
    with fastdiff_kernels.backend(name):
        assert fastdiff_kernels.explain(loss, *args) == forced
    with fastdiff_kernels.backend("reference" if name == "cpu" else "cpu"):
        assert fastdiff_kernels.explain(forcing) == forced


def test_explain_names_what_has_the_definition_run():
    (x, other), shift = torch.randn(2, 2, 3, 4), torch.zeros(2, 4)
    modulate, rotate = fastdiff_kernels.ops.layer_norm_modulate, fastdiff_kernels.ops.qk_norm_rope

    def norm(x):
        return modulate(x, shift, shift)

    def gradient(**options):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(norm(leaf).sum(), leaf, **options)

    def learned_angles():
        q, angles = torch.randn(2, 3, 1, 4), torch.zeros(3, 2, requires_grad=True)
        rotate(q, q, cos=angles.cos(), sin=angles.sin(), norm=None)

    def lines(fn, *args):
        return [line.split("; ")[0] for line in fastdiff_kernels.explain(fn, *args).splitlines()]

    by_kernel = "layer_norm_modulate: cpu (reference: not preferred here"
    assert lines(torch.func.jvp, norm, (x,), (other,)) == ["layer_norm_modulate: reference (forward mode runs its definition)"]
    assert lines(torch.vmap(norm), x[None]) == ["layer_norm_modulate: reference (vmap runs its definition)"]
    assert lines(gradient) == [by_kernel, by_kernel.replace(":", "_backward:", 1)]
    assert [line.partition(" (")[0] for line in lines(lambda: gradient(create_graph=True))] == [
        "layer_norm_modulate: cpu", "layer_norm_modulate_backward: reference",
    ]  # fmt: skip
    assert lines(learned_angles) == ["qk_norm_rope: reference (only its definition has a gradient of cos and sin)"]
    assert fastdiff_kernels.explain(torch.relu, x) == "relu: called no fastdiff op"


@pytest.mark.parametrize("name", ["explain", "backend", "nested backends"])
def test_a_compiled_function_is_compiled_again_outside(name: str):
    x, shift, graphs = torch.randn(2, 3, 4), torch.zeros(2, 4), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: fastdiff_kernels.ops.layer_norm_modulate(x, shift, shift), backend=count, fullgraph=True)
    if name == "explain":
        assert fastdiff_kernels.explain(compiled, x).startswith("layer_norm_modulate: cpu (")
    else:
        with fastdiff_kernels.backend("cpu"):
            if name == "nested backends":
                with fastdiff_kernels.backend("reference"):
                    compiled(x)
            compiled(x)
    assert not graphs
    compiled(x)
    assert len(graphs) == 1


def test_a_backend_may_be_forced_in_a_compiled_function():
    x, shift = torch.randn(2, 3, 4), torch.zeros(2, 4)

    @torch.compile(backend="eager")
    def forcing(x):
        with fastdiff_kernels.backend("reference"):
            return fastdiff_kernels.ops.layer_norm_modulate(x, shift, shift)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo does not know how to trace")
        found = forcing(x)
    assert torch.equal(found, OPS["layer_norm_modulate"].reference(x, shift, shift, None, 1e-6))
    # And the compiler is left as it was.
    assert torch.compile(torch.sin, backend="eager", fullgraph=True)(x).equal(x.sin())


def test_the_definitions_do_not_warn_while_the_library_is_there():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdiff_kernels.ops.lcss_noise(torch.zeros(1, 2), 0)
