"""Trees for the walkers: shapes that strain them, and paths through them."""

import torch


def shaped_tree(shape: str, nodes: int, generator: torch.Generator) -> torch.Tensor:
    """Return the parents of a tree: a chain, a star, a comb (a chain with a leaf at every node) or a random one."""
    if shape == "chain":
        return torch.arange(-1, nodes - 1)
    if shape == "star":
        return torch.tensor([-1] + [0] * (nodes - 1))
    if shape == "comb":
        return torch.tensor([-1] + [max(0, node - 2 + node % 2) for node in range(1, nodes)])
    return random_trees(1, nodes, generator)[0]


def random_trees(batch: int, nodes: int, generator: torch.Generator) -> torch.Tensor:
    """Return parents `(batch, nodes)`, parents before children, each row a tree of its own."""
    parents = torch.full((batch, nodes), -1)
    for row in range(batch):
        reach = int(torch.randint(1, nodes + 1, (), generator=generator))  # 1: a chain
        for node in range(1, nodes):
            parents[row, node] = torch.randint(max(0, node - reach), node, (), generator=generator)
    return parents


def paths_of(parents: torch.Tensor) -> torch.Tensor:
    """Return the path to some node of every row, root first, padded with -1."""
    paths = []
    for row, own in enumerate(parents.tolist()):
        node, path = (len(own) - 1 - 3 * row) % len(own), []
        while node >= 0:
            path.append(node)
            node = own[node]
        paths.append(path[::-1])
    longest = max(map(len, paths))
    return torch.tensor([path + [-1] * (longest - len(path)) for path in paths])
