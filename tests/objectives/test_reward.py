from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from trialist.data.preferences import PreferencePair
from trialist.data.reward_groups import collate_groups, group_pairs
from trialist.objectives.reward import RewardLoss, soft_bradley_terry

PAD = 0


def reward_model(seed: int = 0, labels: int = 1) -> GPT2ForSequenceClassification:
    """In float64 throughout, which Llama's norms are not."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=labels, pad_token_id=PAD,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config).double()


def pairs_of(anchors: int = 3, answers: int = 6) -> tuple[list[PreferencePair], list[float]]:
    """All pairs of the answers to each prompt, lengths unequal, labels 1, 1/2 and something between."""
    draw = torch.Generator().manual_seed(1)

    def tokens(low, high):
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(1, 31, (length,), generator=draw).tolist()

    pairs, labels = [], []
    for anchor in range(anchors):
        prompt, given = tokens(2, 7), [tokens(1, 9) for _ in range(answers - anchor)]
        for i in range(len(given)):
            for j in range(i):
                pairs.append(PreferencePair(prompt, given[i], given[j], len(pairs)))
                labels.append((1.0, 0.5, 0.75)[len(pairs) % 3])
    return pairs, labels


def batch_of(pairs, labels, **options):
    return collate_groups(group_pairs(pairs, labels, **options), pad_token_id=PAD)


def loss_and_gradient(batch, objective=RewardLoss(), seed=0):  # noqa: B008 - frozen
    model = reward_model(seed)
    loss, stats = objective(model, batch)
    loss.backward()
    return loss, stats, {name: parameter.grad for name, parameter in model.named_parameters()}


def naive(model, pairs, labels):
    """Sequence by sequence, pair by pair, in the paper's words."""
    total = torch.zeros((), dtype=torch.float64)
    for pair, p in zip(pairs, labels):
        rewards = [model(torch.tensor([pair.prompt + answer])).logits[0, 0] for answer in (pair.chosen, pair.rejected)]
        probability = 1 / (1 + torch.exp(rewards[1] - rewards[0]))
        total = total - p * torch.log(probability) - (1 - p) * torch.log(1 - probability)
    return total


def test_scoring_each_sequence_once_is_the_naive_loop_over_pairs():
    pairs, labels = pairs_of()
    model = reward_model()
    expected = naive(model, pairs, labels)
    expected.backward()
    loss, stats, gradients = loss_and_gradient(batch_of(pairs, labels))
    assert abs(loss.item() - expected.item()) < 1e-12
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert stats["weight"] == len(pairs) == 15 + 10 + 6


def test_sharing_sequences_changes_only_how_many_are_scored():
    pairs, labels = pairs_of()
    shared, apart = (batch_of(pairs, labels, share=share) for share in (True, False))
    assert (len(shared["input_ids"]), len(apart["input_ids"])) == (6 + 5 + 4, 2 * 31)
    (loss, _, gradients), (other, _, others) = loss_and_gradient(shared), loss_and_gradient(apart)
    assert abs(loss.item() - other.item()) < 1e-11
    for name in gradients:
        torch.testing.assert_close(gradients[name], others[name], rtol=1e-9, atol=1e-12)


def test_label_one_is_bradley_terry_to_the_bit():
    difference = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 8
    ours, theirs = difference.clone().requires_grad_(), difference.clone().requires_grad_()
    loss, plain = soft_bradley_terry(ours, torch.ones(1000)), -torch.nn.functional.logsigmoid(theirs)
    assert torch.equal(loss, plain)
    loss.sum().backward()
    plain.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_a_tie_costs_least_at_equal_rewards_and_then_ln_2():
    half = torch.tensor(0.5, dtype=torch.float64)
    at = torch.linspace(-3, 3, 601, dtype=torch.float64)
    losses = soft_bradley_terry(at, half.expand(601))
    assert losses.argmin() == 300
    assert losses[300].item() == pytest.approx(math.log(2), abs=1e-15)
    torch.testing.assert_close(losses, losses.flip(0))


def test_the_least_loss_is_at_the_log_odds_of_the_label():
    for p in (0.1, 0.6, 0.95):
        d = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
        loss = soft_bradley_terry(d, torch.tensor(p, dtype=torch.float64))
        loss.backward()
        assert abs(d.grad.item()) < 1e-15
        assert loss.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_gradients_are_exact():
    d = torch.tensor([-4.0, -0.3, 0.0, 0.7, 30.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([1.0, 0.5, 0.5, 0.25, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_bradley_terry, (d, p))


def test_exchanging_the_answers_and_the_label_changes_nothing():
    pairs, labels = pairs_of(2)
    turned = [PreferencePair(pair.prompt, pair.rejected, pair.chosen, pair.row) for pair in pairs]
    for objective in (RewardLoss(), RewardLoss(center=0.1)):
        loss, stats, _ = loss_and_gradient(batch_of(pairs, labels), objective)
        other, others, _ = loss_and_gradient(batch_of(turned, [1 - p for p in labels]), objective)
        torch.testing.assert_close(loss, other)
        assert all(torch.isclose(stats[name], others[name]) for name in stats)


def test_more_padding_and_other_groups_in_the_batch_change_nothing():
    pairs, labels = pairs_of()
    alone = [
        loss_and_gradient(batch_of(pairs[part], labels[part]))[0] for part in (slice(15), slice(15, 25), slice(25, 31))
    ]
    batch = batch_of(pairs, labels)
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 5), value=PAD)
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 5))
    torch.testing.assert_close(loss_and_gradient(batch)[0], sum(alone), rtol=1e-10, atol=0)


@pytest.mark.parametrize("fill", [PAD, 7], ids=["configured padding", "other padding"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_alone_says_what_is_padding(side, fill):
    pairs, labels = pairs_of()
    batch = batch_of(pairs, labels)
    expected = loss_and_gradient(batch)[0]
    ids, mask = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, fill), batch["attention_mask"]
    if side == "left":
        lengths = mask.sum(1).tolist()
        ids, mask = (torch.stack([row.roll(-n) for row, n in zip(columns, lengths)]) for columns in (ids, mask))
        assert mask[:, -1].all()
    found = loss_and_gradient({**batch, "input_ids": ids, "attention_mask": mask})[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_padding_without_a_padding_token_in_the_configuration_is_an_error():
    pairs, labels = pairs_of()
    model = reward_model()
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"config\.pad_token_id is None.*set it"):
        RewardLoss()(model, batch_of(pairs, labels))


def test_the_penalty_is_on_the_squared_sum_of_the_rewards_of_a_pair():
    pairs, labels = pairs_of(1, 2)
    model = reward_model()
    both = [
        model(torch.tensor([pairs[0].prompt + answer])).logits.item() for answer in (pairs[0].chosen, pairs[0].rejected)
    ]
    plain, penalised = (RewardLoss(center)(model, batch_of(pairs, labels))[0].item() for center in (0.0, 0.3))
    assert penalised - plain == pytest.approx(0.3 * sum(both) ** 2, rel=1e-9)


class Fixed(torch.nn.Module):
    """Rewards 3, 1, 1."""

    def __init__(self):
        super().__init__()
        self.config = GPT2Config(pad_token_id=PAD)

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"logits": torch.tensor([[3.0], [1.0], [1.0]])})


def test_stats_count_decided_pairs_and_ties_apart():
    batch = {
        "input_ids": torch.ones(3, 2, dtype=torch.long),
        "attention_mask": torch.ones(3, 2, dtype=torch.long),
        "pairs": torch.tensor([[0, 1], [1, 0], [1, 0], [0, 2], [1, 2]]),
        "label_prob": torch.tensor([1.0, 1.0, 0.2, 0.5, 1.0]),
    }
    stats = {name: float(value) for name, value in RewardLoss()(Fixed(), batch)[1].items()}
    assert stats == {
        "weight": 5, "decided": 4, "correct": 1 + 0 + 1 + 0.5, "margin": 2 - 2 + 2 + 0, "distance": 2,
        "mean_reward": 4 * 2 + 1, "mean_squared_reward": 4 * 5 + 1,
    }  # fmt: skip


def test_a_margin_is_what_the_better_one_must_be_above_by_hand():
    d, p = torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    found = soft_bradley_terry(d, p, torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64))
    expected = [math.log(1 + math.exp(1)), math.log(1 + math.exp(5)), math.log(1 + math.exp(1))]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_margins_go_through_groups_and_batches_to_their_pairs():
    pairs, labels = pairs_of(2)
    margins = [0.3 * n for n in range(len(pairs))]
    model = reward_model()
    loss, _ = RewardLoss()(model, batch_of(pairs, labels, margin=margins))
    total = 0.0
    for pair, p, m in zip(pairs, labels, margins):
        a, b = (model(torch.tensor([pair.prompt + answer])).logits.item() for answer in (pair.chosen, pair.rejected))
        total += p * math.log(1 + math.exp(b - a + m)) + (1 - p) * math.log(1 + math.exp(a - b + m))
    assert loss.item() == pytest.approx(total, rel=1e-6)  # margins are float32
    groups = [*group_pairs(pairs[:15], labels[:15], margin=margins[:15]), *group_pairs(pairs[15:], labels[15:])]
    with pytest.raises(ValueError, match="lacks 'margin'"):
        collate_groups(groups, pad_token_id=PAD)


def test_a_prompt_of_many_rows_is_cut_into_groups_of_bounded_size():
    pairs = [PreferencePair([9, 8], [1, n], [2, n], n) for n in range(20)]
    shared, apart = (group_pairs(pairs, [1.0] * 20, largest=6, share=share) for share in (True, False))
    assert (
        [len(group["sequences"]) for group in shared] == [len(group["sequences"]) for group in apart] == [6] * 6 + [4]
    )
    assert sum(len(group["pairs"]) for group in shared) == 20
    again = group_pairs([*pairs[:3], *pairs[:3]], [1.0] * 6, largest=6, share=False)
    assert [len(group["pairs"]) for group in again] == [6]  # six distinct sequences, however often they stand there
    assert max(len(group["sequences"]) for group in group_pairs(pairs, [1.0] * 20)) == 16


def test_pairs_of_one_anchor_are_a_group_in_the_order_of_the_rows():
    pairs = [PreferencePair([9], [1], [2], 0), PreferencePair([8], [3], [4], 1), PreferencePair([9], [2], [5], 2)]
    assert group_pairs(pairs, [1.0, 0.5, 1.0]) == [
        {"sequences": [[9, 1], [9, 2], [9, 5]], "pairs": [[0, 1], [1, 2]], "label_prob": [1.0, 1.0]},
        {"sequences": [[8, 3], [8, 4]], "pairs": [[0, 1]], "label_prob": [0.5]},
    ]
    assert len(group_pairs(pairs, [1.0, 0.5, 1.0], anchors=[0, 1, 2])) == 3


def test_a_batch_counts_the_pairs_through_its_groups():
    pairs = [
        PreferencePair([9], [1], [2, 7], 0),
        PreferencePair([8, 6], [3], [4], 1),
        PreferencePair([9], [2, 7], [5], 2),
    ]
    batch = collate_groups(group_pairs(pairs, [1.0, 0.5, 0.0]), pad_token_id=PAD)
    assert batch["input_ids"].tolist() == [[9, 1, 0], [9, 2, 7], [9, 5, 0], [8, 6, 3], [8, 6, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert batch["pairs"].tolist() == [[0, 1], [1, 2], [3, 4]]
    assert batch["label_prob"].tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("column", ["label_prob", "pairs"])
def test_a_column_that_the_trainer_took_away_is_an_error_and_not_another_loss(column):
    pairs, labels = pairs_of(1)
    batch = batch_of(pairs, labels)
    del batch[column]
    with pytest.raises(ValueError, match=rf"lacks '{column}'.*remove_unused_columns=False"):
        RewardLoss()(reward_model(), batch)
    groups = [{name: value for name, value in group.items() if name != column} for group in group_pairs(pairs, labels)]
    with pytest.raises(ValueError, match=rf"lacks '{column}'.*remove_unused_columns=False"):
        collate_groups(groups, pad_token_id=PAD)


def test_what_cannot_work_is_said():
    pairs, labels = pairs_of(1)
    batch = batch_of(pairs, labels)
    with pytest.raises(ValueError, match=r"row 4: label_prob is 1.2"):
        group_pairs(pairs, [1, 0.5, 0, 1.2, *labels[4:]])
    with pytest.raises(ValueError, match="15 pairs, 3 label_prob"):
        group_pairs(pairs, labels[:3])
    with pytest.raises(ValueError, match=r"wanted \(P, 2\) and \(P,\)"):
        RewardLoss()(reward_model(), {**batch, "label_prob": batch["label_prob"][:3]})
    with pytest.raises(ValueError, match="num_labels=1"):
        RewardLoss()(reward_model(labels=2), batch)
    with pytest.raises(ValueError, match="center is -1"):
        RewardLoss(center=-1)
