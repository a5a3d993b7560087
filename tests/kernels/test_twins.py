import torch

from lowmem_dpo_kernels import twins


def test_token_logps_follows_its_definition():
    """Bias, then scale, then soft-cap; written out with numbers that can be checked by hand."""
    hidden = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    bias = torch.tensor([0.5, 0.0, -0.5])
    logits = torch.tensor([[0.0, -1.0, -1.0], [1.0, 2.0, 3.0]]) + bias
    logits = 2.0 * torch.tanh(0.5 * logits / 2.0)
    logps = twins.token_logps(
        hidden,
        torch.tensor([1, 0, 0]),
        weight,
        torch.tensor([2, 1, -100]),
        bias=bias,
        logit_scale=0.5,
        logit_softcap=2.0,
    )
    expected = [logits[0, 2] - logits[0].logsumexp(0), logits[1, 1] - logits[1].logsumexp(0), 0.0]
    torch.testing.assert_close(logps, torch.tensor(expected))


def test_token_logps_of_half_inputs_is_taken_from_fp32_logits():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 16, generator=generator).bfloat16()
    weight = (4 * torch.randn(99, 16, generator=generator)).bfloat16()
    rows, targets = torch.arange(8), torch.arange(8)
    logps = twins.token_logps(hidden, rows, weight, targets)
    exact = twins.token_logps(hidden.double(), rows, weight.double(), targets)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), exact, atol=1e-5, rtol=1e-6)
