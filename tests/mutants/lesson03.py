"""Answers to the tasks of lesson 03."""

from typing import Any

import torch


def logits(x, weight):
    return x.float() @ weight.float().T


def chosen(z, k):
    best, expert = z.topk(k)
    return best.softmax(-1), expert


class TopKRouter(Any):
    task = "03.1"

    def right_in_order_of_experts(x, weight, k):
        rows, ids = [torch.empty(0, k)], [torch.empty(0, k, dtype=torch.int64)]
        for token in x.float():
            z = weight.float() @ token
            best = z.topk(k).indices.sort().values
            rows.append(z[None, best].softmax(1))
            ids.append(best[None])
        return torch.cat(rows), torch.cat(ids)

    def wrong_naive_exponential(x, weight, k):
        """says: not finite"""
        e = logits(x, weight).exp()
        w, expert = (e / e.sum(-1, keepdim=True)).topk(k)
        return w / w.sum(-1, keepdim=True), expert


class ChooseThenWeigh(Any):
    task = "03.2"

    def right_softmax_gather(logits, k, norm_topk_prob):
        expert = logits.argsort(-1, descending=True)[..., :k]
        if norm_topk_prob:
            return logits.gather(-1, expert).softmax(-1), expert
        return logits.softmax(-1).gather(-1, expert), expert

    def wrong_largest_of_the_batch(logits, k, norm_topk_prob):
        """raises: an empty batch"""
        e = (logits - logits.max()).exp()
        w, expert = e.topk(k)
        return w / (w if norm_topk_prob else e).sum(-1, keepdim=True), expert


class GateGradient(Any):
    task = "03.3"

    def right_backwards(z, g, k, renormalise):
        z = z.clone().requires_grad_()
        best, expert = z.topk(k)
        below = (best if renormalise else z).logsumexp(-1, keepdim=True)
        ((best - below).exp() * g.gather(1, expert)).sum().backward()
        return z.grad

    def wrong_bare_exp(z, g, k, renormalise):
        """says: not finite. Look for a division by zero, or for exp() of a large number"""
        z = (z.exp() / z.exp().sum(-1, keepdim=True)).log()
        return GateGradient.right_backwards(z, g, k, renormalise)


def noisy(z, k, sigma, training):
    return chosen(z + sigma * training * torch.randn_like(z), k)


def moved(says, change):
    """An answer that chooses by what `change` makes of the logits and of the spread of the noise."""

    def answer(x, weight, k, sigma, training):
        return chosen(change(logits(x, weight), sigma * training), k)

    answer.__doc__ = f"says: {says}"
    return answer


class NoisyRouter(Any):
    task = "03.4"

    def right_normal_distribution(x, weight, k, sigma, training):
        z = torch.nn.functional.linear(x.float(), weight.float())
        if training and sigma > 0:
            z = torch.distributions.Normal(z, sigma).sample()
        return chosen(z, k)

    wrong_one_noise = moved("for the whole batch", lambda z, s: z + s * torch.randn(z.shape[1]))
    wrong_variance = moved("root of sigma", lambda z, s: z + s**0.5 * torch.randn_like(z))
    wrong_uniform = moved("uniform", lambda z, s: z + s * torch.rand_like(z))
    wrong_factor = moved("not that of equation (6)", lambda z, s: z * (1 + s * torch.randn_like(z)))

    def wrong_never(x, weight, k, sigma, training):
        """says: no noise in training; or all experts of a token have the same"""
        return chosen(logits(x, weight), k)

    def wrong_always(x, weight, k, sigma, training):
        """says: noise when the model is used"""
        return noisy(logits(x, weight), k, sigma, True)

    def wrong_after_the_choice(x, weight, k, sigma, training):
        """says: The choice never changes"""
        w, expert = chosen(logits(x, weight), k)
        return w + sigma * training * torch.randn_like(w), expert

    def wrong_on_probabilities(x, weight, k, sigma, training):
        """says: added to the probabilities"""
        p = logits(x, weight).softmax(-1)
        w, expert = (p + sigma * training * torch.randn_like(p)).topk(k)
        return w / w.sum(-1, keepdim=True), expert

    def wrong_clean_weights(x, weight, k, sigma, training):
        """says: those of the clean logits"""
        z = logits(x, weight)
        expert = noisy(z, k, sigma, training)[1]
        return z.gather(1, expert).softmax(-1), expert

    def wrong_seeded(x, weight, k, sigma, training):
        """says: a seed is set inside"""
        torch.manual_seed(0)
        return noisy(logits(x, weight), k, sigma, training)

    def wrong_not_scaled(x, weight, k, sigma, training):
        """says: noise that sigma does not scale"""
        return noisy(logits(x, weight), k, 1, training)

    def wrong_in_the_type_of_x(x, weight, k, sigma, training):
        """says: not the router of task 03.1, which computes in float32"""
        return noisy(x @ weight.T, k, sigma, training)

    def wrong_noise_on_x(x, weight, k, sigma, training):
        """says: The noise is on x"""
        x = x.float()
        return chosen(logits(x + sigma * torch.randn_like(x) * training, weight), k)

    def wrong_jitter_on_a_copy(x, weight, k, sigma, training):
        """says: as jitter is"""
        noise = torch.empty(x.shape).uniform_(1 - sigma, 1 + sigma) if training else 1
        return chosen(logits(x.float() * noise, weight), k)


class BatchIndependentWeights(Any):
    task = "03.5"

    def right_ones(scores, k):
        w, expert = scores.topk(k)
        return (torch.ones_like(w) if k == 1 else w / w.sum(-1, keepdim=True)), expert

    def wrong_on_view(scores, k):
        """says: the last dimension is missing"""
        w, expert = scores.max(dim=-1) if k == 1 else scores.topk(k, dim=-1)
        return w / torch.linalg.vector_norm(w, ord=1, dim=-1, keepdim=True), expert
