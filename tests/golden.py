"""The hand-computed inputs of the golden tests, shared by the plug-ins' tests. All float64."""

import torch


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    """Largest absolute difference within ``tolerance``; shapes must agree."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected).abs().max().item()
    assert difference < tolerance, f"differs by {difference:.3g}: {actual.tolist()} against {expected.tolist()}"
