"""AdaLoRA's schedule: budgets, choices and penalty against PEFT's, in a training step and out of one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax as pj
from peft_jax import train
from peft_jax.methods.adalora import rank_allocator
from peft_jax.train.hooks import scheduled

STACKED = {r"layers\.up\.kernel": pj.Layout((0,), (1,), (2,))}
OPTIONS = {
    "init_r": 4,
    "target_r": 2,
    "total_step": 24,
    "tinit": 3,
    "tfinal": 5,
    "deltaT": 3,
    "beta1": 0.8,
    "beta2": 0.7,
    "orth_reg_weight": 0.3,
    "target_modules": r"layers\.[02]\.up|head",
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max(initial=0)))


def tree():
    """Three stacked layers, of which the middle one is no target, and a layer of its own."""
    return {"layers": {"up": {"kernel": normal(1, 3, 6, 5)}}, "head": {"kernel": normal(2, 5, 7)}}


def adapted(**changes):
    config = pj.AdaLoraConfig(**{**OPTIONS, "init_lora_weights": False, **changes})
    return pj.apply_adapter(tree(), config, layout=STACKED)


def forward(params, ids, mask):
    """Logits of one-hot ids, in which every kernel takes part."""
    x = jax.nn.one_hot(ids, 6)
    for i in range(3):
        x = jnp.tanh(jnp.pad(x @ params["layers"]["up"]["kernel"][i], ((0, 0), (0, 0), (0, 1))))
    return x[..., :5] @ params["head"]["kernel"]


BATCH = {
    "input_ids": jnp.array([[1, 2, 3, 4], [5, 0, 1, 3]]),
    "attention_mask": jnp.ones((2, 4), jnp.int32),
    "labels": jnp.array([[1, 2, 3, 4], [5, 0, 1, 3]]),
}


def by_module(values):
    """Stacked arrays by leaf as arrays by PEFT's name of the module."""
    (ups, head) = (values[path] for path in ("layers.up.kernel", "head.kernel"))
    return {"layers.0.up": jax.tree.map(lambda x: x[0], ups), "layers.2.up": jax.tree.map(lambda x: x[2], ups)} | {
        "head": head
    }


def as_torch(role, array):
    """Our array as PEFT's parameter lies."""
    array = np.array(array)
    return array[:, None] if role == "lora_E" else array.T


@pytest.fixture
def theirs():
    """PEFT's model with the same layers, its adapter set to ours."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    layers = [torch.nn.ModuleDict({"up": torch.nn.Linear(6, 5, bias=False)}) for _ in range(3)]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers), "head": torch.nn.Linear(5, 7, bias=False)})
    model = peft.get_peft_model(model, peft.AdaLoraConfig(**OPTIONS))
    _, _, leaves = scheduled(adapted())
    arrays = by_module({path: leaf.params for path, leaf in leaves.items()})
    with torch.no_grad():
        for name, parameter in model.base_model.model.named_parameters():
            if "lora_" in name:
                module, role, _ = name.rsplit(".", 2)
                parameter.copy_(torch.tensor(as_torch(role, arrays[module][role])))
    return model


@pytest.mark.parametrize(
    "times",
    [
        {"tinit": 0, "tfinal": 0, "total_step": 30},
        {"tinit": 4, "tfinal": 7, "total_step": 40},
        {"tinit": 0, "tfinal": 3, "total_step": 7},
    ],
)
def test_budgets_are_pefts(times, theirs):
    allocator = theirs.base_model.rankallocator
    allocator.peft_config = theirs.peft_config["default"]
    for name, value in times.items():
        setattr(allocator.peft_config, name, value)
    for initial, target in [(12, 6), (2000, 1000), (960, 8)]:
        allocator.init_bgt, allocator.target_bgt = initial, target
        for step in range(times["total_step"] + 1):
            assert rank_allocator.budget(step, initial, target, **times) == allocator.budget_schedule(step)[0]


def test_each_step_is_that_of_pefts_allocator(theirs):
    """Equal arrays and equal gradients over all phases: sensitivities, uncertainties, arrays and patterns."""
    import torch

    _, config, leaves = scheduled(adapted())
    params = {path: leaf.params for path, leaf in leaves.items()}
    state = config.begin(leaves)
    allocate = jax.jit(config.advance)
    allocator, model = theirs.base_model.rankallocator, theirs.base_model
    patterns = set()
    for step in range(1, 28):
        key = iter(range(100 * step, 100 * step + 100))
        gradients = jax.tree.map(lambda array: normal(next(key), *array.shape), params)  # noqa: B023
        slopes = by_module(gradients)
        with torch.no_grad():
            for name, parameter in model.model.named_parameters():
                if "lora_" in name:
                    module, role, _ = name.rsplit(".", 2)
                    parameter.grad = torch.tensor(as_torch(role, slopes[module][role]))
                    parameter.sub_(0.05 * parameter.grad)
        model.update_and_allocate(step)
        params = jax.tree.map(lambda array, gradient: array - 0.05 * gradient, params, gradients)
        params, state = allocate(params, gradients, state)
        ours, kept = by_module(params), by_module(state.kept)
        measures = {"exp_avg_ipt": by_module(state.importance), "exp_avg_unc": by_module(state.uncertainty)}
        for name, parameter in model.model.named_parameters():
            if "lora_" in name:
                module, role, _ = name.rsplit(".", 2)
                close(as_torch(role, ours[module][role]), parameter.detach().numpy(), 1e-6)
                for measure, values in measures.items():
                    if name in getattr(allocator, measure):  # PEFT forgets them after the last choice
                        want = getattr(allocator, measure)[name].numpy()
                        close(as_torch(role, values[module][role]), want, 1e-6)
        pattern = model.peft_config["default"].rank_pattern
        got = {f"{module}.lora_E.default": mask.tolist() for module, mask in kept.items()}
        assert got == (pattern or {name: [True] * 4 for name in got}), step
        patterns.add(str(got))
    assert len(patterns) >= 4 and sum(map(sum, got.values())) == 6


def test_the_penalty_is_pefts(theirs):
    import torch

    _, config, leaves = scheduled(adapted())
    outputs = SimpleNamespace(loss=torch.zeros(()))
    theirs.base_model.model.forward = lambda: outputs
    want = theirs.base_model.forward().loss.detach().numpy()
    close(config.penalty(leaves), want)
    assert want > 1


def test_the_penalty_has_a_slope_where_layers_have_no_ranks_or_are_no_targets():
    names = ["layers.0.up", "layers.2.up", "head"]
    pattern = {f"{name}.lora_E": [i != 1] * 4 for i, name in enumerate(names)}
    params = adapted(rank_pattern=pattern)
    trainable, frozen = pj.partition(params)

    def penalty(trainable):
        _, config, leaves = scheduled(pj.combine(trainable, frozen))
        return config.penalty(leaves)

    slope = jax.grad(penalty)(trainable)["layers"]["up"]["kernel"].params
    assert np.isfinite(slope["lora_A"]).all() and np.abs(slope["lora_A"][0]).max() > 1e-3
    assert not slope["lora_A"][1:].any() and not slope["lora_B"][1:].any()


def run(params, steps, optimizer=None):
    """Train for some steps, and return states, losses and the frozen twin."""
    optimizer = optimizer or optax.adam(0.02)
    step = train.make_training_step(pj.adapt(forward), optimizer)
    state, frozen = train.start(params, optimizer, seed=0)
    losses = []
    for now, metrics in train.train(step, state, frozen, [BATCH] * steps, max_steps=steps):
        losses.append(float(metrics.loss))
        state = now
    assert step._cache_size() == 1
    return state, losses, frozen


def test_a_run_ends_with_the_target_rank_and_saves_it(tmp_path):
    state, losses, frozen = run(adapted(lora_alpha=4, tfinal=0), 24)
    assert losses[-1] < losses[0]
    live = pj.combine(state.trainable, frozen)
    params = train.finished(state.trainable, frozen, state.opt_state)
    kept = {name: np.asarray(mask) for name, mask in by_module(state.opt_state.schedule.kept).items()}
    assert sum(mask.sum() for mask in kept.values()) == 6, "tfinal=0 chooses at the last step"
    pattern = {f"{name}.lora_E": mask.tolist() for name, mask in kept.items()}
    config = params["head"]["kernel"].tag.config
    assert config.rank_pattern == pattern
    tensors = pj.get_peft_model_state_dict(params)
    for name, mask in kept.items():
        rank = int(mask.sum())
        shapes = [tensors[f"base_model.model.{name}.{role}"].shape for role in ("lora_A", "lora_E", "lora_B")]
        assert [shapes[0][0], shapes[1], shapes[2][1]] == [rank, (rank, 1), rank]
    assert f"trainable params: {sum(tensor.size for tensor in tensors.values())} ||" in pj.summary(params)
    logits = forward(pj.merge(params), BATCH["input_ids"], None)
    close(logits, forward(pj.merge(live), BATCH["input_ids"], None))
    assert np.abs(logits - forward(tree(), BATCH["input_ids"], None)).max() > 0.1
    pj.interop.save_adapter(params, tmp_path)
    loaded = pj.interop.load_adapter(tree(), tmp_path, layout=STACKED, is_trainable=True)
    close(forward(pj.merge(loaded), BATCH["input_ids"], None), logits)
    # It can be trained on: there is nothing more to take away.
    again, _, frozen = run(loaded, 24)
    assert train.finished(again.trainable, frozen, again.opt_state)["head"]["kernel"].tag.config.rank_pattern == pattern


def test_a_narrowed_adapter_can_be_narrowed_further():
    state, _, frozen = run(adapted(tfinal=0), 24)
    params = train.finished(state.trainable, frozen, state.opt_state)
    before = params["head"]["kernel"].tag.config
    tensors = pj.get_peft_model_state_dict(params)
    config = before.replace(target_r=1)
    params = pj.set_peft_model_state_dict(tree(), config, tensors, layout=STACKED)
    state, _, frozen = run(params, 24)
    after = train.finished(state.trainable, frozen, state.opt_state)["head"]["kernel"].tag.config.rank_pattern
    assert sum(map(sum, after.values())) == 3
    for name, mask in after.items():
        assert len(mask) == 4 and all(old or not new for old, new in zip(before.rank_pattern[name], mask, strict=True))


def test_what_has_grown_again_is_saved_amid_the_schedule():
    """Two choices apart masked values grow again; what is saved then computes what the run's model computes."""
    state, _, frozen = run(adapted(), 14)  # the last choice was after step 12
    masked = sum(int((~np.asarray(mask)).sum()) for mask in by_module(state.opt_state.schedule.kept).values())
    assert masked > 0
    params = train.finished(state.trainable, frozen, state.opt_state)
    live = pj.combine(state.trainable, frozen)
    close(pj.merge(params)["head"]["kernel"], pj.merge(live)["head"]["kernel"])
    close(pj.merge(params)["layers"]["up"]["kernel"], pj.merge(live)["layers"]["up"]["kernel"])


def test_before_the_first_choice_nothing_is_told():
    state, _, frozen = run(adapted(), 3)
    params = train.finished(state.trainable, frozen, state.opt_state)
    assert params["head"]["kernel"].tag.config.rank_pattern is None


def test_a_layer_without_any_rank_goes_to_peft_and_back(theirs, tmp_path):
    import peft

    pattern = {f"{name}.lora_E": [i > 0] * 4 for i, name in enumerate(["layers.0.up", "layers.2.up", "head"])}
    params = adapted(rank_pattern=pattern)
    pj.interop.save_adapter(params, tmp_path)
    tensors = pj.get_peft_model_state_dict(params)
    assert tensors["base_model.model.layers.0.up.lora_A"].shape == (0, 6)
    with pytest.warns():  # of tensors without elements
        loaded = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path)
        again = peft.get_peft_model_state_dict(loaded)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert np.array_equal(again[key].numpy(), tensor), key
    merged = pj.merge(pj.interop.load_adapter(tree(), tmp_path, layout=STACKED))
    np.testing.assert_array_equal(merged["layers"]["up"]["kernel"][0], tree()["layers"]["up"]["kernel"][0])
    assert np.abs(merged["layers"]["up"]["kernel"][2] - tree()["layers"]["up"]["kernel"][2]).max() > 0.1


def test_micro_batches_count_the_penalty_once():
    params, optimizer = adapted(), optax.sgd(0.1)
    results = []
    for size in (2, 1):
        step = train.make_training_step(pj.adapt(forward), optimizer, micro_batch_size=size)
        state, frozen = train.start(jax.tree.map(jnp.copy, params), optimizer, seed=0)
        results.append(step(state.trainable, state.opt_state, frozen, BATCH, jax.random.key(0)))
    close(results[0][2].loss, results[1][2].loss)
    for one, other in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(results[1][0]), strict=True):
        close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_step": None}, "needs total_step, the number of steps of the whole training"),
        ({"target_r": 6}, "target_r=6 is above init_r=4"),
        ({"tinit": 20}, "tinit=20 and tfinal=5 leave no step of total_step=24"),
        ({"beta1": 1.0}, "needs beta1 above 0 and below 1, got 1.0"),
        ({"deltaT": 0}, "needs deltaT of at least 1, got 0"),
        ({"orth_reg_weight": -1}, "needs orth_reg_weight of at least 0, got -1"),
        ({"init_r": 0}, "needs init_r of at least 1, got 0"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'. Give it a value of: bool"),
        ({"use_dora": True}, "use_dora=True\\) is not supported"),
    ],
)
def test_wrong_values_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        adapted(**options)


def test_r_is_warned_of_as_in_peft():
    with pytest.warns(UserWarning, match="does not use r=4. Set init_r and target_r"):
        pj.AdaLoraConfig(r=4)


def test_two_schedules_at_once_and_a_forgotten_state_are_told():
    params = adapted()
    with pytest.raises(ValueError, match="Make the optimizer's state by peft_jax.train.init_optimizer"):
        trainable, frozen = pj.partition(params)
        step = train.make_training_step(pj.adapt(forward), optax.sgd(0.1))
        step(trainable, optax.sgd(0.1).init(trainable), frozen, BATCH, jax.random.key(0))
    both = pj.apply_adapter(params, pj.AdaLoraConfig(**OPTIONS), adapter_name="second", layout=STACKED)
    with pytest.raises(ValueError, match=r"Adapters \['default', 'second'\] are trained by a schedule each"):
        train.start(both, optax.sgd(0.1), seed=0)
