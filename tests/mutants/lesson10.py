"""Answers to the tasks of lesson 10."""

import math
from typing import Any

import numpy as np
import torch


class Bill(Any):
    task = "10.1"

    def right_pass_by_pass(held, used, layers, width, length, tokens, peak, share, devices):
        forward = 2 * used + 4 * layers * width * length / 2
        work = tokens * (forward + 2 * forward + forward)
        return work / (devices * share * peak) / 86_400, share * 3 / 4

    def right_from_the_mfu(held, used, layers, width, length, tokens, peak, share, devices):
        mfu = 0.75 * share
        model = 6 * tokens * (used + layers * width * length)
        return torch.tensor(model / (peak * mfu * devices * 24 * 3600)), np.float64(mfu)

    def wrong_two_at_once(held, used, layers, width, length, tokens, peak, share, devices):
        """says: These are hours. Days are asked for. The MFU is the share"""
        days, _ = Bill.right_pass_by_pass(
            held, used, layers, width, length, tokens, peak, share, devices
        )
        return 24 * days, share

    def wrong_order(*given):
        """says: Your numbers are right.roll(1, 0) in every case"""
        return Bill.right_pass_by_pass(*given)[::-1]

    def wrong_days_alone(*given):
        """says: Look at what your function returns"""
        return Bill.right_pass_by_pass(*given)[0]


class Worth(Any):
    task = "10.2"

    def right_with_numpy(size, loss, routed):
        size, loss, routed = size.numpy(), loss.numpy(), routed.numpy()
        sizes = np.unique(size)
        y = np.array([np.log(loss[size == n]).mean() for n in sizes])
        found = np.interp(-np.log(routed), -y, np.log(sizes), left=np.nan, right=np.nan)
        return torch.from_numpy(np.exp(found))

    def right_one_by_one(size, loss, routed):
        sizes = size.unique().tolist()
        means = [loss[size == n].mean().item() for n in sizes]
        out = []
        for wanted in routed.tolist():
            found = math.nan
            for i in range(len(sizes) - 1):
                if means[i] >= wanted >= means[i + 1]:
                    part = math.log(means[i] / wanted) / math.log(means[i] / means[i + 1])
                    found = sizes[i] * (sizes[i + 1] / sizes[i]) ** part
            out.append(found)
        return torch.tensor(out, dtype=torch.float64)

    def wrong_logarithms(size, loss, routed):
        """says: All that is wrong stands where right > 0"""
        return Worth.right_with_numpy(size, loss, routed).log()

    def wrong_list(size, loss, routed):
        """says: the sizes is not a tensor"""
        return Worth.right_with_numpy(size, loss, routed).tolist()

    def wrong_only_known(size, loss, routed):
        """says: The shape of the sizes is not the one"""
        found = Worth.right_with_numpy(size, loss, routed)
        return found[~found.isnan()]


class SlopeAt(Any):
    task = "10.3"

    def right_with_lstsq(used, experts, loss, error, size):
        n, e, y = used.log10(), experts.log10(), loss.log10()
        x = torch.stack([e, n * e, n, torch.ones_like(n)], 1) / error[:, None]
        found = torch.linalg.lstsq(x, (y / error)[:, None]).solution[:, 0]
        g = torch.tensor([1, math.log10(size), 0, 0], dtype=x.dtype)
        return (g @ found).item(), (g @ torch.linalg.inv(x.T @ x) @ g).sqrt().item()

    def right_centred(used, experts, loss, error, size):
        """At log N counted from the size, the slope is the coefficient of log E alone."""
        n, e, y = used.log10() - math.log10(size), experts.log10(), loss.log10()
        x = torch.stack([n, e, n * e, torch.ones_like(n)], 1)
        cov = torch.linalg.inv(x.T @ (x / error[:, None] ** 2))
        found = cov @ x.T @ (y / error**2)
        return found[1], cov[1, 1] ** 0.5

    def wrong_two_at_once(used, experts, loss, error, size):
        """says: This is b, the slope of a model of one parameter"""
        b, _ = SlopeAt.right_with_lstsq(used, experts, loss, error, 1.0)
        return b, SlopeAt.right_with_lstsq(used, experts, loss, error, size)[1] ** 2

    def wrong_slope_alone(*given):
        """says: Look at what your function returns"""
        return SlopeAt.right_with_lstsq(*given)[0]

    def wrong_sign(*given):
        """says: There your numbers are -1 times the right ones, in every case"""
        slope, error = SlopeAt.right_with_lstsq(*given)
        return -slope, error


class Mfu(Any):
    task = "10.4"

    def right_by_layers(config, rate, devices, peak):
        d, f = config["hidden_size"], config["intermediate_size"]
        flops = 2 * d * config["vocab_size"]
        for _ in range(config["num_hidden_layers"]):
            flops += 2 * (config["attention"] + d * config["num_local_experts"])
            for _ in range(config["num_experts_per_tok"] + config["n_shared_experts"]):
                flops += 2 * (d * f + d * f + f * d)
        return 3 * flops * rate / devices / peak

    def right_as_a_tensor(config, rate, devices, peak):
        return torch.tensor(Mfu.right_by_layers(config, rate, devices, peak), dtype=torch.float64)

    def wrong_percent(config, rate, devices, peak):
        """says: 100 times the right ones"""
        return 100 * Mfu.right_by_layers(config, rate, devices, peak)

    def wrong_one_layer(config, rate, devices, peak):
        """says: would be right if config['num_hidden_layers'] were 1"""
        return Mfu.right_by_layers(config | {"num_hidden_layers": 1}, rate, devices, peak)

    def wrong_flops(config, rate, devices, peak):
        """says: Your numbers do not depend on devices"""
        return Mfu.right_by_layers(config, rate, devices, peak) * devices * peak
