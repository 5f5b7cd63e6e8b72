"""kronfluence on the dense form of a loaded proxy: its gradient dot products are our scores."""

import kronfluence  # `make test` installs it
import pytest
import torch
from scipy import stats
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from iprox.influence.estimators.ekfac import divided
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.kronecker.eigen import kronecker_curvature, together
from iprox.models.layers import influence_layers
from iprox.models.loss import causal_lm_losses
from iprox.proxy.compress import derive_proxy
from iprox.proxy.export import to_dense
from iprox.proxy.size import Size


class Rows(Dataset):
    """Examples of one length, as kronfluence's loader wants them."""

    def __init__(self, batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.input_ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.batch.input_ids[row], "labels": self.batch.labels[row]}


class MeanLoss(kronfluence.Task):
    """The sum of the examples' mean losses over supervised tokens."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return (losses.sum(1) / (labels != -100).sum(1)).sum()

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.layers


def test_identity_scores_equal_ours(tiny, tmp_path):
    pool, validation = tiny.batch([12] * 10, seed=1), tiny.batch([12] * 3, seed=2)
    made, _ = derive_proxy(tiny.model(dtype=torch.float32), [pool], Size(0.5))
    made.save_pretrained(tmp_path / "proxy")
    proxy = AutoModelForCausalLM.from_pretrained(tmp_path / "proxy", dtype=torch.float32)
    scores, losses = BatchScorer(proxy, {"task": mean_gradient(proxy, [validation])})(pool)
    assert torch.allclose(losses, causal_lm_losses(proxy, pool))

    arguments = kronfluence.arguments.FactorArguments(strategy="identity")
    dense = to_dense(proxy)  # whose layers have the gradients that a proxy is scored by
    layers = list(influence_layers(dense))
    theirs = kronfluence_scores(dense, layers, pool, validation, arguments, tmp_path)
    assert stats.spearmanr(theirs.numpy(), scores[:, 0].numpy()).statistic > 0.999
    torch.testing.assert_close(theirs, scores[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ekfac", "kfac"])
def test_influence_functions_equal_ours(tiny, tmp_path, strategy):
    model = tiny.model("qwen2", dtype=torch.float32)  # with biases
    pool, validation = tiny.batch([12] * 10, seed=1), tiny.batch([12] * 3, seed=2)
    layers = influence_layers(model)
    query = mean_gradient(model, [validation])
    bases = together(kronecker_curvature(model, layers, [pool], corrected=strategy == "ekfac", labels="data"))
    # kronfluence's own rule of damping is ours.
    solved = {name: divided(part, bases[name], 0.1) for name, part in query.items()}
    scores, _ = BatchScorer(model, {"task": solved})(pool)
    arguments = kronfluence.arguments.FactorArguments(strategy=strategy, use_empirical_fisher=True)
    theirs = kronfluence_scores(model, list(layers), pool, validation, arguments, tmp_path)
    assert stats.spearmanr(theirs.numpy(), scores[:, 0].numpy()).statistic > 0.99
    if strategy == "ekfac":
        torch.testing.assert_close(theirs, scores[:, 0], rtol=1e-2, atol=1e-2 * float(scores.abs().max()))


def kronfluence_scores(model, layers, pool, validation, arguments, folder):
    """The mean over the validation examples of kronfluence's scores of a pool."""
    task = MeanLoss(layers)
    prepared = kronfluence.prepare_model(model, task)
    analyzer = kronfluence.Analyzer("model", prepared, task, output_dir=str(folder / "out"), disable_tqdm=True)
    analyzer.fit_all_factors("factors", Rows(pool), factor_args=arguments, per_device_batch_size=4)
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        Rows(validation),
        Rows(pool),
        per_device_query_batch_size=3,
        per_device_train_batch_size=5,
        score_args=kronfluence.arguments.ScoreArguments(damping_factor=None),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].float().mean(0)
