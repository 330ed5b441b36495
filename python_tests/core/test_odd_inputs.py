"""A hundred things that a beginner types: each ends in one sentence of ours that says what is wrong, and what to do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rvsm_kernels as rk

ODD: list[tuple[str, str]] = [
    # what the parameters are
    ("RVSM(model)", "takes parameters, not a module.*param_groups"),
    ("RVSM(model.weight)", "iterable of Tensors|params argument"),
    ("RVSM(0.1)", "takes the parameters first"),
    ("RVSM('weights')", "takes the parameters first"),
    ("RVSM(0.1, model.parameters())", "takes the parameters first"),
    ("RVSM([])", "empty parameter list"),
    ("RVSM([1.0, 2.0])", "can only optimize Tensors"),
    ("RVSM([np.ones(3)])", "can only optimize Tensors"),
    ("RVSM([model])", "can only optimize Tensors"),
    ("RVSM([model.weight * 2])", "non-leaf"),
    ("RVSM([{'parameters': [model.weight]}])", "params"),
    ("RVSM([{'params': model.weight}, {'params': model.weight}])", "more than one parameter group"),
    ("RVSM([('a', model.weight), model.bias])", "names"),
    ("RVSM()", "params"),
    ("RVSM(params=0.1)", "takes the parameters first"),
    ("RVSM([nn.Parameter(torch.ones(2, dtype=torch.complex64))])", "dtype"),
    ("RVSM([nn.Parameter(torch.ones(2, 2).to_sparse())])", "layout"),
    # options
    ("RVSM(params, lr='0.1')", "learning rate.*number"),
    ("RVSM(params, lr=None)", "learning rate.*number"),
    ("RVSM(params, lr=params)", "learning rate.*a list"),
    ("RVSM(params, lr=[0.1])", "learning rate.*number"),
    ("RVSM(params, lr=np.ones(2))", "learning rate.*number"),
    ("RVSM(params, lr=-0.1)", "learning rate.*-0.1"),
    ("RVSM(params, lr=True)", "learning rate.*number"),
    ("RVSM(params, lr=1j)", "learning rate.*number"),
    ("RVSM(params, lr=torch.ones(2))", "1-element"),
    ("RVSM(params, momentum='high')", "momentum.*number"),
    ("RVSM(params, nesterov=True)", "Nesterov"),
    ("RVSM(params, weight_decay=None)", "weight_decay.*number"),
    ("RVSM(params, dampening=params)", "dampening.*number"),
    ("RVSM(params, penalty='L0')", "penalty.*'L0'.*'l0'"),
    ("RVSM(params, penalty=0)", "penalty.*0.*'l0'"),
    ("RVSM(params, penalty=rk.prox)", "penalty.*'l0'"),
    ("RVSM(params, penalty=['l0'])", "penalty.*'l0'"),
    ("RVSM(params, penalty='topk')", "density"),
    ("RVSM(params, penalty='topk', density=50)", "density"),
    ("RVSM(params, penalty='topk', density='half')", "density.*number"),
    ("RVSM(params, lam=-1)", "lam"),
    ("RVSM(params, lam='1e-4')", "lam.*number"),
    ("RVSM(params, lam=[1e-4, 1e-5])", "lam.*number"),
    ("RVSM(params, beta=None)", "beta.*number"),
    ("RVSM(params, a=0)", "a value"),
    ("RVSM(params, method='RVSM')", "method.*'RVSM'.*'rvsm'"),
    ("RVSM(params, group_dim='channels')", "group_dim must be"),
    ("RVSM(params, group_dim=1.0)", "group_dim must be"),
    ("RVSM([model.weight], group_dim=2)", "group_dim.*2 dimensions, 0 to 1"),
    ("RVSM([model.bias], group_dim=1)", "group_dim.*1 dimension .*param_groups"),
    ("RVSM([model.weight], group_dim=(1, 1))", "named twice"),
    ("RVSM(params, group_lasso=0.1)", "needs a group_dim"),
    ("RVSM(params, lambda_=0.1)", "has no option 'lambda_'"),
    ("RVSM(params, lamda=0.1)", "did you mean 'lam'"),
    ("RVSM(params, bta=0.1)", "did you mean 'beta'"),
    ("RVSM(params, learning_rate=0.1)", "has no option 'learning_rate'"),
    ("RVSM(params, betas=(0.9, 0.99))", "did you mean 'beta'"),
    ("RVSM(params, structure='in_channels')", "belongs to rvsm_kernels.param_groups"),
    ("RVSM(params, fused=True)", "has no option 'fused'"),
    ("RVSM(params, foreach=True)", "has no option 'foreach'"),
    ("RVSM(params, amp_scaling='yes')", "amp_scaling.*True or False"),
    ("RVSM(params, engine='cuda')", "engine.*'cuda'.*native"),
    ("RVSM(params, engine='Native')", "engine.*'Native'.*native"),
    ("RVSM(params, engine=0)", "engine.*0.*native"),
    ("RVSM(params, 0.1, 0.9, 0, 0, False, 'l0')", "positional"),
    ("rk.AdaptiveHardThreshold(params)", "needs a density"),
    ("rk.AdaptiveHardThreshold(params, densty=0.5)", "did you mean 'density'"),
    ("rk.AdaptiveHardThreshold(params, density=2)", "density"),
    ("rk.RVSMAdamW(params, momentum=0.9)", "no option 'momentum'"),
    ("rk.RVSMAdamW(params, unit_norm=True)", "no option 'unit_norm'"),
    ("rk.RVSMAdamW(params, betas=0.9)", "Invalid betas value: 0.9"),
    ("rk.RVSMAdamW(params, betas=(0.9, 1.0))", "Invalid beta parameter at index 1: 1.0"),
    ("rk.RVSMAdamW(params, betas=('a', 0.9))", "beta parameter at index 0"),
    ("rk.RVSMAdamW(params, eps=-1)", "Invalid epsilon value: -1"),
    ("rk.RVSMAdamW(params, weight_decay=-1)", "Invalid weight_decay value: -1"),
    ("rk.RVSMAdamW(params).load_state_dict(torch.optim.SGD(params).state_dict())", "no checkpoint of RVSMAdamW"),
    (
        "rk.RVSMAdamW(params).load_state_dict(torch.optim.Adam(params, weight_decay=0.1).state_dict())",
        "torch.optim.Adam, whose weight decay",
    ),
    ("rk.RVSMWrapper(params)", "is no torch optimizer"),
    ("rk.RVSMWrapper(torch.optim.SGD(params), lr=0.1)", "no option 'lr'"),
    # models
    ("rk.param_groups(model.parameters())", "takes a module.*generator"),
    ("rk.param_groups(params)", "takes a module.*list"),
    ("rk.param_groups(type(model))", "takes a module"),
    ("rk.param_groups(nn.ReLU())", "no weights"),
    ("rk.param_groups(nn.Embedding(3, 2))", "Embedding.*include"),
    ("rk.param_groups(nn.BatchNorm2d(3))", "no weights"),
    ("rk.param_groups(model, include=[nn.Conv2d])", "no weight.*Linear"),
    ("rk.param_groups(model, include='Linear')", "module types"),
    ("rk.param_groups(model, include=(model,))", "module types"),
    ("rk.param_groups(model, include=())", "no weight"),
    ("rk.param_groups(model, structure='channels')", "structure.*'channels'.*in_channels"),
    ("rk.param_groups(model, structure=1)", "structure.*1.*in_channels"),
    ("rk.param_groups(model, structure='kernels', group_dim=1)", "give one of the two"),
    ("rk.param_groups(model, lamda=0.1)", "did you mean 'lam'"),
    ("rk.param_groups(model, sparsity=0.9)", "no option 'sparsity'"),
    ("rk.param_groups(frozen)", "frozen"),
    ("rk.describe(params)", "takes a module"),
    ("rk.sparsity(optimizer)", "optimizer.sparsity"),
    ("rk.sparsity(params)", "takes a module"),
    ("rk.sparsity(model.weight)", "takes a module"),
    ("rk.sparsity(model, group_dim=5)", "group_dim.*weight has 2 dimensions"),
    ("rk.sparsity(model, group_dim='in')", "group_dim must be"),
    # prox
    ("rk.prox(np.ones(3), 'l1', 0.1)", "torch.as_tensor"),
    ("rk.prox([1.0], 'l1', 0.1)", "takes a tensor"),
    ("rk.prox(torch.ones(3, dtype=torch.int64), 'l1', 0.1)", "does not support"),
    ("rk.prox(torch.ones(3), 'lasso', 0.1)", "penalty.*'lasso'.*'l1'"),
    ("rk.prox(torch.ones(3), 'l1', -0.1)", "tau"),
    ("rk.prox(torch.ones(3), 'topk', 0.1)", "density"),
    ("rk.prox(torch.ones(3), 'tl1', 0.1, 0.0)", "a value"),
    ("rk.prox(torch.ones(3), 'l1', 0.1, group_dim=1)", "group_dim"),
    # an optimizer that exists
    ("optimizer.step(0.1)", "closure"),
    ("setattr(optimizer, 'lr', 0.1)", "param_groups"),
    ("optimizer.lam", "param_groups"),
    ("optimizer.sparse_weights(0.5)", "takes a module"),
    ("optimizer.add_param_group([nn.Parameter(torch.ones(2))])", "dict"),
    ("optimizer.add_param_group({'params': [nn.Parameter(torch.ones(2))]})", "named_parameters"),
    ("optimizer.add_param_group({'params': model.weight})", "more than one parameter group|names"),
    ("optimizer.load_state_dict(model.state_dict())", "state_dict.*param_groups"),
    ("optimizer.load_state_dict('checkpoint.pt')", "torch.load"),
    ("optimizer.load_state_dict({})", "param_groups"),
    ("optimizer.load_state_dict(torch.optim.AdamW(params).state_dict())", "no checkpoint of RVSM"),
    ("optimizer.load_state_dict(torch.optim.SGD([model.bias]).state_dict())", "same groups"),
    ("rk.to_torch_state_dict(model, optimizer)", "optimizer, then the model"),
    ("rk.to_torch_state_dict(optimizer, nn.Linear(2, 2))", "not those of the model"),
    ("inside(lambda: optimizer.step())", "inside sparse_weights"),
    ("inside(lambda: optimizer.sparsify_())", "inside sparse_weights"),
    ("inside(lambda: copy.deepcopy(optimizer))", "inside sparse_weights"),
    ("inside(lambda: pickle.dumps(optimizer))", "inside sparse_weights"),
    ("edited('lr', 'fast').step()", "learning rate.*number"),
    ("edited('penalty', 'l3').sparsity()", "penalty"),
    ("edited('group_dim', 7).step()", "group_dim"),
    ("edited('lam', None).penalty_value()", "lam.*number"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("typed", "text"), ODD, ids=[typed for typed, _ in ODD])
def test_odd_input(typed: str, text: str) -> None:
    model = nn.Linear(40, 30)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", lam=0.1, beta=1.0), lr=0.1)

    def inside(call: Any) -> None:
        with optimizer.sparse_weights():
            call()

    def edited(key: str, value: Any) -> Any:
        optimizer.param_groups[0][key] = value
        return optimizer

    model(torch.ones(1, 40)).sum().backward()
    names = {"rk": rk, "nn": nn, "np": np, "torch": torch, "copy": copy, "pickle": pickle, "RVSM": rk.RVSM}
    here = {"model": model, "frozen": frozen, "params": list(model.parameters()), "optimizer": optimizer}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError), match=f"(?s){text}") as info:
        eval(typed, {**names, **here, "inside": inside, "edited": edited})
    assert len(str(info.value)) < 420, "an error is a sentence, not a screen of weights"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
