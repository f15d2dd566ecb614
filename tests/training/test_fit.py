from __future__ import annotations

import math
import sys
import time

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, get_scheduler

from trialist.objectives.cross_entropy import CrossEntropy
from trialist.optimizers.adamw import adamw
from trialist.training.fit import fit, rise
from trialist.training.measures import batch_cost
from trialist.training.schedules import Schedule
from trialist.training.state import scale_gradients, stream_seed


def sgd(model, learning_rate=0.1):
    return torch.optim.SGD(model.parameters(), lr=learning_rate)


class Constant(nn.Module):
    """A model of one weight w; the objective below makes its loss w * x."""

    def __init__(self, value=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value))


def times(values):
    """Batches whose loss is w * value per token, and their objective."""

    def objective(model, batch):
        return (model.w * batch["x"]).sum(), {"weight": batch["x"].numel()}

    def batches(index):
        return {"input_ids": torch.zeros(1, 2, dtype=torch.long), "x": torch.tensor([values[index % len(values)]] * 2)}

    return batches, objective


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_run_equals_a_plain_torch_loop(llama, batches):
    model, plain = llama(), llama()
    result = fit(model, batches, CrossEntropy(), adamw(model, 1e-2), budget={"steps": 7}, clip=0.5)
    optimizer, losses = adamw(plain, 1e-2), []
    for step in range(7):
        batch = batches(step)
        logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    # float32 sums in another order; Adam's division amplifies them where gradients are near zero
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def test_eight_micro_batches_train_like_one_batch_of_eight(llama, batches):
    one, eight = llama(), llama()

    def joined(index):
        parts = [batches(8 * index + micro) for micro in range(8)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    counts = {int((batches(index)["labels"][:, 1:] != -100).sum()) for index in range(8)}
    assert len(counts) > 2  # a mean of means would differ
    whole = fit(one, joined, CrossEntropy(), sgd(one), budget={"steps": 12}, clip=0.3)
    split = fit(eight, batches, CrossEntropy(), sgd(eight), budget={"steps": 12}, accumulate=8, clip=0.3)
    difference = torch.tensor(split.losses) - torch.tensor(whole.losses)
    assert difference.abs().max() < 2e-6
    assert difference.mean().abs() < 5e-7  # no drift to one side
    for a, b in zip(one.parameters(), eight.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_scaled_and_clipped_as_torch_does():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2))]
    for weight, clip in ((3.0, 0.5), (3.0, 1e6), (3.0, None)):
        sums = [torch.randn_like(parameter) * 10 for parameter in parameters[:2]]
        for parameter, gradient in zip(parameters, sums):
            parameter.grad = gradient.clone()
        norm = scale_gradients(parameters, torch.tensor(weight), clip)
        ours = [parameter.grad.clone() for parameter in parameters[:2]]
        for parameter, gradient in zip(parameters, sums):
            parameter.grad = gradient / weight
        expected = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        torch.testing.assert_close(norm, expected)
        for gradient, parameter in zip(ours, parameters):
            torch.testing.assert_close(gradient, parameter.grad)


def test_a_budget_in_steps_is_spent_exactly(llama, batches):
    model = llama()
    result = fit(model, batches, CrossEntropy(), sgd(model), budget={"steps": 5}, accumulate=2, flops_per_token=7.0)
    tokens = sum(int(batches(index)["attention_mask"].sum()) for index in range(10))
    assert result.steps == 5
    assert result.cost["steps"] == 5
    assert result.cost["tokens"] == tokens
    assert result.cost["flops"] == 3 * 7.0 * 10 * 33  # padding is computed too
    assert result.cost["seconds"] > 0


def test_padding_between_packed_documents_is_no_token():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]])
    assert batch_cost({"input_ids": torch.zeros(3, 6), "position_ids": positions}, None) == {"tokens": 5 + 2 + 6}


@pytest.mark.parametrize("amount", [26, 27, 28, 60, 61])
def test_a_budget_in_tokens_ends_with_the_step_that_reaches_it(llama, batches, amount):
    model = llama()
    per_step = [int(batches(index)["attention_mask"].sum()) for index in range(9)]
    reached = next(n for n in range(1, 9) if sum(per_step[:n]) >= amount)
    result = fit(model, batches, CrossEntropy(), sgd(model), budget={"tokens": amount})
    assert (result.steps, result.cost["tokens"]) == (reached, sum(per_step[:reached]))


def test_a_budget_in_flops_counts_three_forward_passes(llama, batches):
    model = llama()
    result = fit(
        model,
        batches,
        CrossEntropy(),
        sgd(model),
        budget={"flops": 3 * 33 * 11 * 4},
        flops_per_token=lambda length: length,
    )
    assert result.steps == 4
    assert result.cost["flops"] == 3 * 33 * 11 * 4


def test_flops_are_counted_from_the_modules_of_the_model(llama, batches):
    model = llama()
    result = fit(model, batches, CrossEntropy(), sgd(model), budget={"steps": 2})
    layer = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40
    assert result.cost["flops"] == 3 * 2 * 33 * (2 * (2 * layer + 61 * 24) + 2 * 4 * 24 * 11)


def test_a_budget_in_seconds_leaves_evaluation_out(llama, batches):
    model = llama()
    began = time.perf_counter()
    result = fit(
        model,
        batches,
        CrossEntropy(),
        sgd(model),
        budget={"seconds": 0.1},
        evaluate=lambda _: time.sleep(0.15) or {"slept": 1.0},
    )
    assert 0.1 <= result.cost["seconds"] < time.perf_counter() - began - 0.15 + 0.01


def test_the_random_state_of_the_caller_neither_matters_nor_changes(llama, batches):
    models = []
    for outside in (1, 2):
        model = llama(attention_dropout=0.3)
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        fit(model, batches, CrossEntropy(), sgd(model), budget={"steps": 3}, seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        models.append(model)
    assert same_weights(*models)


def test_another_seed_draws_other_dropout(llama, batches):
    models = [llama(attention_dropout=0.3) for _ in range(2)]
    for seed, model in enumerate(models):
        fit(model, batches, CrossEntropy(), sgd(model), budget={"steps": 2}, seed=seed)
    assert not same_weights(*models)


def test_evaluation_that_draws_random_numbers_leaves_training_unchanged(llama, batches):
    models = [llama(attention_dropout=0.3) for _ in range(2)]
    drawn = []
    fit(models[0], batches, CrossEntropy(), sgd(models[0]), budget={"steps": 4})
    result = fit(
        models[1],
        batches,
        CrossEntropy(),
        sgd(models[1]),
        budget={"steps": 4},
        evaluate=lambda model: (
            drawn.append((float(torch.rand(())), model.training, torch.is_grad_enabled())) or {"n": 1}
        ),
        evaluate_every=2,
    )
    assert same_weights(*models)
    assert result.curves["n"] == [(2.0, 1.0), (4.0, 1.0)]
    assert len(set(drawn)) == 1  # every evaluation draws the same numbers
    assert drawn[0][1:] == (False, False)


def test_each_step_draws_new_numbers_and_every_arm_the_same():
    drawn = {}
    for arm in ("small", "large"):
        numbers = drawn.setdefault(arm, [])

        def objective(model, batch, arm=arm, numbers=numbers):
            numbers.append(torch.rand(()).item())
            torch.rand(1 if arm == "small" else 100)
            return model.w * 1, {"weight": 1}

        model = Constant()
        fit(model, times([1.0])[0], objective, sgd(model), budget={"steps": 4})
    assert drawn["small"] == drawn["large"]
    assert len(set(drawn["small"])) == 4


def test_streams_of_other_seeds_names_and_steps_differ():
    assert stream_seed(3, "step", 4) == stream_seed(3, "step", 4)
    assert len({stream_seed(seed, name, step) for seed in (0, 1) for name in "ab" for step in (1, 2)}) == 8


def test_curves_stand_against_the_unit_of_the_budget(llama, batches):
    model = llama()
    result = fit(
        model,
        batches,
        CrossEntropy(),
        sgd(model),
        budget={"tokens": 80},
        evaluate=lambda _: {"m": 2.0},
        evaluate_every=2,
    )
    tokens = [sum(int(batches(index)["attention_mask"].sum()) for index in range(n)) for n in (1, 2, 3)]
    assert result.curves["m"] == [(tokens[1], 2.0), (tokens[2], 2.0)]
    assert [x for x, _ in result.curves["train_loss"]] == tokens
    assert [y for _, y in result.curves["train_loss"]] == list(result.losses)


def test_the_training_curve_weighs_steps_by_their_tokens():
    model = Constant()
    values = [1.0, 2.0, 5.0]

    def batches(index):
        tokens = 1 + index % 2
        return {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "x": torch.full((tokens,), values[index % 3])}

    def objective(model, batch):
        return (batch["x"] + 0 * model.w).sum(), {"weight": batch["x"].numel()}

    result = fit(model, batches, objective, sgd(model), budget={"steps": 150}, divergence_margin=math.inf)
    assert len(result.curves["train_loss"]) == 75
    assert result.curves["train_loss"][0] == (2.0, pytest.approx((1 * 1.0 + 2 * 2.0) / 3))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "warmup_stable_decay"])
def test_the_learning_rate_is_that_of_transformers(name, batches):
    options = {"num_decay_steps": 3} if name == "warmup_stable_decay" else {}
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    model, (data, objective) = Constant(), times([1.0])
    schedule = Schedule(name, warmup=3, options=options)
    fit(model, data, objective, sgd(model, 0.7), schedule, {"steps": 10}, callbacks=[Rates])
    other = sgd(Constant(), 0.7)
    expected = get_scheduler(name, other, 3, 10, scheduler_specific_kwargs=options)
    wanted = []
    for _ in range(10):
        wanted.append(other.param_groups[0]["lr"])
        other.step()
        expected.step()
    assert rates == wanted


def test_a_schedule_under_a_token_budget_ends_with_it():
    model, (data, objective) = Constant(), times([1.0])
    optimizer = sgd(model)
    result = fit(model, data, objective, optimizer, "linear", {"tokens": 19})
    assert result.steps == 10
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_a_torch_scheduler_is_taken_as_it_is_or_made():
    for make in (lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5), None):
        model, (data, objective) = Constant(), times([1.0])
        optimizer = sgd(model, 1.0)
        schedule = make or torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        fit(model, data, objective, optimizer, schedule, {"steps": 5}, clip=None, divergence_margin=math.inf)
        assert model.w.item() == 1.0 - (1 + 1 + 0.5 + 0.5 + 0.25)


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_divergence_at_its_step(bad, word):
    model, (data, objective) = Constant(), times([1.0, 1.0, 1.0, bad])
    evaluated = []
    result = fit(
        model, data, objective, sgd(model), budget={"steps": 9}, evaluate=lambda m: evaluated.append(1) or {"n": 0.0}
    )
    assert result.diverged == f"loss is {word} at step 4"
    assert result.steps == 4
    assert math.isfinite(model.w.item())  # the step did not reach the weight
    assert not evaluated
    assert len(result.curves["train_loss"]) == 3


def test_where_the_host_looks_late_the_step_is_still_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["trialist.training.fit"], "_look_every", lambda device: 10)
    model, (data, objective) = Constant(), times([1.0, 1.0, 1.0, math.nan])
    result = fit(model, data, objective, sgd(model), budget={"steps": 20}, checkpoint=tmp_path, checkpoint_every=3)
    assert result.diverged == "loss is nan at step 4"
    assert result.steps == 6  # the checkpoint of step 6 needed a look
    assert {path.name[:13] for path in tmp_path.iterdir()} == {"step-00000003"}


def test_looking_late_changes_no_number(llama, batches, monkeypatch):
    results = []
    for every in (1, 10):
        monkeypatch.setattr(sys.modules["trialist.training.fit"], "_look_every", lambda device, every=every: every)
        model = llama()
        results.append(fit(model, batches, CrossEntropy(), sgd(model), budget={"steps": 13}))
    assert results[0].losses == results[1].losses
    assert results[0].curves == results[1].curves


def test_a_gradient_that_is_not_finite_is_divergence_at_its_step():
    def objective(model, batch):
        return (model.w - 1.0).abs().sqrt() * batch["x"].sum(), {"weight": 2}

    model = Constant(1.0)
    result = fit(model, times([1.0])[0], objective, sgd(model), budget={"steps": 3})
    assert result.diverged == "gradient norm is nan at step 1"


def test_a_loss_that_ends_above_its_start_is_divergence():
    model, (data, objective) = Constant(), times([1.0])
    uphill = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    result = fit(model, data, objective, uphill, budget={"steps": 30})
    assert (
        result.diverged == "loss 3.45 at step 30 is above its start of 1.45"
    )  # the mean of 3.0 to 3.9, the median of 1.0 to 1.9


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([], False),
        ([3.0], False),
        ([3.0, 9.0], True),
        ([5.5, 4.0, 3.0, 3.0], False),
        ([2.0, 2.1] * 20, False),
        ([2.0] * 10 + [2.19] * 10, False),
        ([2.0] * 10 + [2.21] * 10, True),
        ([1e-4] * 10 + [5e-3] * 10, False),
        ([-1.0] * 10 + [-0.8] * 10, True),
        ([5.5] * 9 + [900.0] + [7.0] * 10, True),
    ],
)
def test_a_rise_is_one_beyond_the_margin(losses, diverged):
    assert (rise(losses, 0.1) is not None) == diverged
    assert rise(losses, math.inf) is None


def test_callbacks_of_the_trainer_hear_of_every_step_and_can_stop(llama, batches):
    heard = []

    class Listener(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            heard.append(("begin", args.gradient_accumulation_steps, state.max_steps))

        def on_step_end(self, args, state, control, logs=None, model=None, **kwargs):
            heard.append(("step", state.global_step, math.isfinite(logs["loss"])))
            control.should_evaluate = state.global_step == 2
            control.should_training_stop = state.global_step == 3
            return control

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            heard.append(("evaluate", state.global_step, metrics))

        def on_train_end(self, args, state, control, **kwargs):
            heard.append(("end", state.global_step))

    model = llama()
    result = fit(
        model,
        batches,
        CrossEntropy(),
        sgd(model),
        budget={"steps": 9},
        callbacks=[Listener()],
        evaluate=lambda _: {"a": 1.0},
    )
    assert result.steps == 3
    assert heard == [
        ("begin", 1, 9),
        ("step", 1, True),
        ("step", 2, True),
        ("evaluate", 2, {"a": 1.0}),
        ("step", 3, True),
        ("evaluate", 3, {"a": 1.0}),
        ("end", 3),
    ]


def test_progress_is_told_to_a_callable(llama, batches):
    told = []
    model = llama()
    fit(model, batches, CrossEntropy(), sgd(model), budget={"steps": 3}, progress=lambda *given: told.append(given))
    done, total, numbers = told[-1]
    assert (done, total) == (3.0, 3.0)
    assert numbers["loss"] > 0


def test_nothing_is_printed_where_stdout_is_no_terminal(llama, batches, capsys):
    model = llama()
    fit(model, batches, CrossEntropy(), sgd(model), budget={"steps": 2})
    assert capsys.readouterr() == ("", "")


def test_the_mode_of_the_model_comes_back(llama, batches):
    model = llama().eval()
    fit(model, batches, CrossEntropy(), sgd(model), budget={"steps": 1})
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_autocast_keeps_weights_in_float32_and_changes_the_loss_a_little(llama, batches):
    exact, mixed = llama(), llama()
    a = fit(exact, batches, CrossEntropy(), sgd(exact), budget={"steps": 4})
    b = fit(mixed, batches, CrossEntropy(), sgd(mixed), budget={"steps": 4}, autocast="bfloat16")
    assert a.losses != b.losses
    assert a.losses == pytest.approx(b.losses, rel=1e-2)
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}


def test_a_model_in_bfloat16_trains(llama, batches):
    model = llama().bfloat16()
    result = fit(model, batches, CrossEntropy(), adamw(model, 1e-2), budget={"steps": 3})
    assert all(math.isfinite(loss) for loss in result.losses)


def test_lora_trains_its_own_weights_alone(llama, batches):
    from peft import LoraConfig, get_peft_model

    base = llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    result = fit(model, lambda index: batches(index % 2), CrossEntropy(), adamw(model, 3e-2), budget={"steps": 30})
    assert result.loss < result.losses[0]
    for name, tensor in model.state_dict().items():
        clean = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" not in name:
            assert torch.equal(tensor, before[clean]), name


def test_a_repeated_batch_is_learnt(llama, batches):
    model = llama()
    result = fit(model, lambda _: batches(0), CrossEntropy(), adamw(model, 1e-2), "cosine", {"steps": 60})
    assert result.losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert result.loss < 0.2 * result.losses[0]
    assert result.diverged is None


def test_a_real_model_learns_new_text(shared_data, batches):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "stories260k"
    if not folder.is_dir():
        pytest.skip("stories260k is absent")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared_data / "tinyshakespeare").glob("*.txt").__next__().read_text()[:40_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])

    def data(index):
        return {"input_ids": ids[(index * 512) % 8192 :][:512].view(4, 128)}

    result = fit(model, data, CrossEntropy(), adamw(model, 2e-3), Schedule("cosine", warmup=4), {"steps": 32})
    assert sum(result.losses[-8:]) < 0.9 * sum(result.losses[:8])


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_losses(llama, batches):
    plain, compiled = llama(), llama()
    a = fit(plain, batches, CrossEntropy(), sgd(plain), budget={"steps": 6})
    b = fit(compiled, batches, CrossEntropy(), sgd(compiled), budget={"steps": 6}, compile=True)
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    assert b.cost["seconds"] < 3  # compilation is not in it
    assert compiled.model._compiled_call_impl is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": {}}, "names one unit"),
        ({"budget": {"steps": 1, "tokens": 2}}, "names one unit"),
        ({"budget": {"epochs": 1}}, "'epochs' is unknown; one of steps, tokens"),
        ({"budget": {"steps": 0}}, "finite number > 0, not 0"),
        ({"budget": {"tokens": math.nan}}, "finite number > 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, not 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
        ({"clip": 0.0}, "clip must be > 0"),
        ({"autocast": "float16"}, "autocast must be 'bfloat16'"),
        ({"schedule": "cosin"}, "schedule 'cosin' is unknown; one of linear, cosine"),
        ({"schedule": "reduce_lr_on_plateau"}, "follows a metric"),
        ({"schedule": "cosine", "budget": {"seconds": 1}}, "Schedule\\(steps"),
    ],
)
def test_arguments_that_cannot_work_are_refused_with_words(llama, batches, options, words):
    model = llama()
    with pytest.raises(ValueError, match=words):
        fit(model, batches, CrossEntropy(), sgd(model), **{"budget": {"steps": 1}, **options})


def test_an_optimizer_of_another_model_is_refused(llama, batches):
    with pytest.raises(ValueError, match="trainable parameters of this model"):
        fit(llama(), batches, CrossEntropy(), sgd(llama(1)))


def test_a_schedule_of_another_optimizer_is_refused(llama, batches):
    model = llama()
    schedule = torch.optim.lr_scheduler.StepLR(sgd(model), 2)
    with pytest.raises(ValueError, match="another optimizer"):
        fit(model, batches, CrossEntropy(), sgd(model), schedule)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda model, batch: (model.w * torch.ones(2), {"weight": 1}), r"scalar sum .* shape \(2,\)"),
        (lambda model, batch: (model.w.detach(), {"weight": 1}), "requires_grad=False"),
        (lambda model, batch: (model.w * 1, {"tokens": 1}), r"stats\['weight'\].*'tokens'"),
        (lambda model, batch: (model.w * 0, {"weight": 0}), "step 1 has weight 0"),
    ],
    ids=["not a scalar", "no gradient", "no weight", "weight zero"],
)
def test_an_objective_that_breaks_its_contract_is_named(objective, words):
    model = Constant()
    with pytest.raises(ValueError, match=words):
        fit(model, times([1.0])[0], objective, sgd(model))


def test_a_batch_without_input_ids_is_refused():
    model = Constant()
    with pytest.raises(ValueError, match="needs 'input_ids' to count its tokens; it has x"):
        fit(model, lambda index: {"x": torch.ones(2)}, times([1.0])[1], sgd(model))


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_sparse_gradient_is_refused_by_its_name_before_a_weight_moves(batches, clip):
    from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM
    from trialist.optimizers import RowAdagrad

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 49, "num_heads": 2, "top_k": 3, "key_dim": 6, "sparse_grad": True}
    config = ModularDecoderConfig(vocab_size=61, ffn_types=["swiglu", "peer"], peer=experts, **sizes)
    model = ModularDecoderForCausalLM(config)
    layer = model.model.layers[1].ffn
    before = layer.up[0].detach().clone()
    words = r"the gradient of model\.layers\.1\.ffn\.down\.0 is sparse.*sparse_grad=False"
    with pytest.raises(ValueError, match=words):
        fit(model, batches, CrossEntropy(), RowAdagrad([*layer.down, *layer.up], lr=0.01), clip=clip, progress=False)
    assert torch.equal(layer.up[0], before)
