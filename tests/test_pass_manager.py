"""Pass managers: which passes run where and in which order, what the cache knows them by, what they report."""

import importlib
import json
import pickle
from dataclasses import FrozenInstanceError
from weakref import WeakKeyDictionary

import pytest
import torch
from ranks import threads
from sample_passes import Counting, LargeOnly, Nothing, Option, TwiceTanhFusion, WithArgument, run

from models_patch import passes
from models_patch.passes import (
    HOOKS,
    POST_GRAD,
    Backend,
    PassConfig,
    PassManager,
    Range,
    compile_range,
    compiler,
    current_config,
    inductor_options,
    register_fusion,
    registered,
    use_config,
)
from models_patch.passes import fusion as fusion_module
from models_patch.passes.cleanup import NoOpElimination

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def registry():
    before = dict(fusion_module._registered)
    yield
    fusion_module._registered.clear()
    fusion_module._registered.update(before)


# Configurations.


def test_configurations_are_values():
    config = PassConfig({"lift_norm": False})
    assert config == PassConfig(fusions={"lift_norm": False}) != PassConfig()
    assert config.compute_hash() == pickle.loads(pickle.dumps(config)).compute_hash() != PassConfig().compute_hash()
    assert PassConfig({"a": True, "b": False}).compute_hash() == PassConfig({"b": False, "a": True}).compute_hash()
    assert Option().compute_hash() != Option(large=True).compute_hash() != PassConfig().compute_hash()
    with pytest.raises(FrozenInstanceError):
        config.pass_pipeline = ()
    with pytest.raises(TypeError):
        config.fusions["lift_norm"] = True
    with pytest.raises(TypeError, match="fusions is list"):
        PassConfig(["lift_norm"])
    with pytest.raises(TypeError, match="fusions has 'lift_norm': 1, expected a name and a bool"):
        PassConfig({"lift_norm": 1})
    with pytest.raises(TypeError, match=r"pass_pipeline is 'a\.B', expected a list"):
        PassConfig(pass_pipeline="a.B")


def test_passes_read_the_current_configuration():
    assert current_config() == PassConfig()
    with use_config(Option(large=True)):
        assert LargeOnly().least == 100
    assert LargeOnly().least == 0
    manager = PassManager.from_config(Option(large=True, pass_pipeline=[LargeOnly]))
    assert dict(manager.passes)["LargeOnly"].least == 100
    with pytest.raises(TypeError, match="config is dict"), use_config({}):
        pass


# Pipelines.


def test_fusions_are_named():
    names = [name for name, _ in PassManager.from_config().passes]
    assert names == [item.name for item in registered() if item.default]
    without = PassManager.from_config(PassConfig({"lift_norm": False}))
    assert [name for name, _ in without.passes] == [name for name in names if name != "lift_norm"]
    with pytest.raises(ValueError, match="names 'norm', expected some of no_op_elimination, lift_norm"):
        PassManager.from_config(PassConfig({"norm": True}))
    assert not PassManager.from_config(hook=HOOKS[0]).passes


def test_an_explicit_pipeline_is_all_there_is():
    ready = LargeOnly()
    name = "models_patch.passes.cleanup.NoOpElimination"
    config = PassConfig({"lift_norm": True}, pass_pipeline=[Nothing, ready, name, TwiceTanhFusion])
    manager = PassManager.from_config(config)
    assert [type(item) for _, item in manager.passes] == [Nothing, LargeOnly, NoOpElimination, TwiceTanhFusion]
    assert dict(manager.passes)["LargeOnly"] is ready
    described = manager.describe_pipeline()
    assert [entry["id"] for entry in described] == ["Nothing", "LargeOnly", "no_op_elimination", "TwiceTanhFusion"]
    assert described[2]["pass"] == name
    assert all(entry["hook"] == POST_GRAD for entry in described)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("Nothing", ValueError, r"pass_pipeline\[1\] is 'Nothing', expected 'package.module.Class'"),
        ("no_such.module.Pass", ValueError, r"\[1\] is .* but no_such.module can't be imported: No module named"),
        ("models_patch.passes.cleanup.Nope", ValueError, r"models_patch.passes.cleanup has no Nope"),
        ("models_patch.passes.report", TypeError, r"which is function, expected a class"),
        (int, TypeError, r"\[1\] is int, expected a Pass"),
        (passes.Pass, TypeError, r"\[1\] is Pass, a base class"),
        ("models_patch.passes.FusionPass", TypeError, r"\[1\] is FusionPass, a base class"),
        ("broken.Pass", ValueError, r"\[1\] is 'broken.Pass', but importing broken raises ZeroDivisionError: "),
        ("broken_when_made.Own", ValueError, r"\[1\] is Own, and making it raises ZeroDivisionError: "),
        (3, TypeError, r"\[1\] is builtins.int, expected a pass"),
        (WithArgument, TypeError, r"\[1\] is WithArgument, which takes arguments: "),
        (Nothing, ValueError, "name is 'Nothing', which .*Nothing has already"),
    ],
)
def test_a_bad_entry_says_which_and_why(entry, error, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0")
    own = "class Own(Nothing):\n    def __init__(self):\n        1 / 0"
    (tmp_path / "broken_when_made.py").write_text(f"from sample_passes import Nothing\n{own}")
    with pytest.raises(error, match=message):
        PassManager.from_config(PassConfig(pass_pipeline=[Nothing, entry]))


def test_managers_refuse_what_is_no_pass_or_hook():
    with pytest.raises(ValueError, match="hook is 'post_grad', expected one of pre_grad_custom_pass"):
        PassManager(hook="post_grad")
    with pytest.raises(TypeError, match="config is dict"):
        PassManager(config={})
    with pytest.raises(TypeError, match=r"pass is builtins\.function"):
        PassManager().add(lambda graph: None)
    with pytest.raises(ValueError, match="bound to joint_custom_pre_pass, expected post_grad"):
        Backend(PassManager(hook="joint_custom_pre_pass"))
    assert PassManager().bind_to_hook(HOOKS[1]).hook == HOOKS[1]


def test_registered_fusions_run_where_they_say(registry):
    register_fusion("last")(Nothing)
    register_fusion("second", after="no_op_elimination")(LargeOnly)
    register_fusion("off", default=False)(TwiceTanhFusion)
    names = [item.name for item in registered()]
    assert names[:2] == ["no_op_elimination", "second"]
    assert names[-2:] == ["last", "off"]
    assert "off" not in dict(PassManager.from_config().passes)
    assert "off" in dict(PassManager.from_config(PassConfig({"off": True})).passes)
    with pytest.raises(ValueError, match="name is 'last', which Nothing has already"):
        register_fusion("last")(LargeOnly)
    with pytest.raises(ValueError, match="after is 'nowhere'"):
        register_fusion("more", after="nowhere")(LargeOnly)
    with pytest.raises(TypeError, match="is no Pass"):
        register_fusion("more")(int)
    with pytest.raises(TypeError, match="replacement is Nothing"):
        TwiceTanhFusion().register(Nothing())


# Hooks, with the compiler's own code.


def test_every_hook_of_the_compiler_and_who_is_there_already():
    own, seen = Counting(), []
    managers = [PassManager([("nothing", Nothing())], hook) for hook in HOOKS[:-1]]
    with torch._inductor.config.patch({POST_GRAD: own, HOOKS[0]: seen.append}):
        options = inductor_options(*managers, PassConfig(pass_pipeline=[TwiceTanhFusion]))
    assert set(options) == set(HOOKS)
    x = torch.randn(3, 5)
    torch.testing.assert_close(torch.compile(lambda x: torch.tanh(x) * 2, options=options)(x), torch.tanh(x) * 2)
    for hook in HOOKS[:-1]:
        assert options[hook].report().operations["seen"] > 0, hook
    assert options[POST_GRAD].report().operations == {"TwiceTanh": 1}
    assert len(seen) == 1
    assert options[HOOKS[0]].uuid() is None  # a function has none, so that nothing is kept
    assert options[POST_GRAD].uuid() is not None
    (graph,) = own.graphs  # behind the manager's: what was replaced isn't there any more
    assert "aten.add.Tensor" in graph
    assert "aten.mul.Tensor" not in graph
    with pytest.raises(ValueError, match="two managers are bound to"):
        inductor_options(PassConfig(), PassConfig())
    with torch._inductor.config.patch({POST_GRAD: options[POST_GRAD]}):  # there already: not twice
        before = len(options[POST_GRAD].passes)
        assert len(inductor_options(options[POST_GRAD])[POST_GRAD].passes) == before
    with pytest.raises(ValueError, match="the manager itself"):
        managers[0].add(managers[0])


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64))

    def forward(self, x, eps=1e-6):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def test_a_number_that_is_an_input_becomes_a_constant():
    """With a guard, where a pattern wants it; sizes stay open."""
    model = Normed()

    def graphs(function, *calls):
        torch._dynamo.reset()
        options = inductor_options()
        compiled = torch.compile(function, options=options, dynamic=True)
        for rows, number in calls:
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x, number), function(x, number))
        return len(passes.report(options).graphs), passes.report(options).operations["rms_norm"]

    assert graphs(model, (4, 0.5), (7, 0.5), (7, 0.25)) == (2, 2)
    assert graphs(lambda x, by: torch.tanh(x) * by, (4, 1.5), (7, 2.5)) == (1, 0)  # nobody wants it


@torch._inductor.config.patch(fx_graph_cache=True)
@torch._functorch.config.patch(enable_autograd_cache=True)
def test_a_compilation_that_starts_again_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, model, options = torch.randn(4, 64), Normed(), inductor_options()
    for from_cache in 0, 1:
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, options=options, dynamic=True)(x, 0.5), model(x, 0.5))
        assert passes.report(options).from_cache == from_cache
        assert len(passes.report(options).graphs) == 1


def test_patterns_are_traced_apart_from_what_is_compiled(monkeypatch):
    """No symbol of an example is left for the compiler to guard."""
    monkeypatch.setattr(fusion_module, "_traced", {})
    monkeypatch.setattr(fusion_module, "_patterns", WeakKeyDictionary())
    options, model, x = inductor_options(), Normed(), torch.randn(4, 64)
    torch.testing.assert_close(torch.compile(model, options=options)(x), model(x))
    assert passes.report(options).operations == {"rms_norm": 1}


@torch._inductor.config.patch(fx_graph_cache=True)
@torch._functorch.config.patch(enable_autograd_cache=True)
def test_a_graph_from_the_cache_says_so_and_computes_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, options = torch.randn(3, 5), inductor_options(PassConfig(pass_pipeline=[TwiceTanhFusion]))
    report = options[POST_GRAD].report()
    for times in 0, 1, 2:
        torch._dynamo.reset()
        y = torch.compile(lambda x: torch.tanh(x) * 2 + 1, options=options)(x)
        torch.testing.assert_close(y, torch.tanh(x) * 2 + 1)
        assert report.from_cache == times
        assert report.operations == {"TwiceTanh": 1}
    assert "2 more from the compiler's cache" in str(report)
    assert pickle.loads(pickle.dumps(report)).from_cache == 2


# Sizes.


def test_passes_run_for_the_sizes_they_are_for():
    tokens = torch.ones(4, 25, dtype=torch.long)
    config = Option(large=True, pass_pipeline=[LargeOnly])

    def ranges(x, **options):
        torch._dynamo.reset()
        manager = run(config, lambda x: x * 2, x, **options)
        (graph,) = manager.report().graphs
        return graph.tokens, graph.passes[0].skipped

    assert ranges(tokens) == (Range(100, 100), "")
    assert ranges(tokens[:, :24]) == (Range(96, 96), "not for 96 tokens")
    lower, upper = ranges(tokens[:, :24], dynamic=True)[0]
    assert (lower, upper) == (4, Range().upper)
    bounded = tokens[:, :24].clone()
    torch._dynamo.mark_dynamic(bounded, 1, min=2, max=64)
    assert ranges(bounded) == (Range(8, 256), "not for 8 to 256 tokens")
    with compile_range(100, 200):
        assert ranges(tokens[:, :24]) == (Range(100, 200), "")
    with pytest.raises(ValueError, match="lower is 3 and upper 2"), compile_range(3, 2):
        pass
    assert ranges(torch.randn(3))[0] == Range()


# The compiler.


def test_another_torch_is_named(monkeypatch):
    monkeypatch.delattr("torch._dynamo.symbolic_convert.TensorifyState")
    with pytest.raises(ImportError, match=rf"torch {torch.__version__[:4]}.* differs from 2.13.*'TensorifyState'"):
        importlib.reload(compiler)


# Reports.


def test_reports_name_modules_and_group_layers():
    class Block(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x) * 2

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block() for _ in range(3)])
            self.head = Block()

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return torch.tanh(self.head(x)) * 3

    manager = run(PassConfig(pass_pipeline=[TwiceTanhFusion]), Model())
    report = manager.report()
    assert [site.path for site in report.sites] == ["layers.0", "layers.1", "layers.2", "head"]
    (miss,) = report.misses
    assert miss.reason == "expected 2, found 3"
    assert [line.split() for line in str(report).splitlines()[2:]] == [
        ["TwiceTanhFusion", "4", "x", "TwiceTanh", "layers.0-2,", "head"],
        ["left", "1:", "expected", "2,", "found", "3", "tanh_4"],
    ]
    found = json.loads(report.json())
    paths = [site["path"] for site in found["graphs"][0]["passes"][0]["matches"]]
    assert paths == ["layers.0", "layers.1", "layers.2", "head"]
    assert found["from_cache"] == 0
    assert report.graphs[0].passes[0].seconds > 0


def test_match_tables_of_all_ranks():
    manager = run(PassConfig(pass_pipeline=[TwiceTanhFusion]))
    for every in threads(2, lambda group: manager.report().gathered(group)):
        assert [ran.operations for ran in every] == [{"TwiceTanh": 1}] * 2


def test_options_without_arguments_are_the_default():
    options = inductor_options()
    assert [name for name, _ in options[POST_GRAD].passes] == [item.name for item in registered() if item.default]
    assert passes.report(options) is options[POST_GRAD].report()
    backend = Backend()
    assert passes.report(backend) is passes.report(backend.manager) is backend.manager.report()
    with pytest.raises(TypeError, match=r"of is \{\}, expected inductor_options"):
        passes.report({})
    with pytest.raises(TypeError, match="Backend: passes is str, expected a PassManager or a PassConfig"):
        Backend("lift_norm")
    with pytest.raises(TypeError, match="inductor_options: passes is dict"):
        inductor_options({"quantized": False})
