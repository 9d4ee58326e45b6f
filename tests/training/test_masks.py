import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from hf_treeflash.block_rule import BlockRule
from hf_treeflash.training.masks import attention_masks, block_mask_rule, dense_mask, flex_mask

from .conftest import make_drafter

ANCHORS = torch.tensor([[1, 3, 3, 8], [2, 5, 9, 10]])
# Two packed documents and padding in row 0, one document in row 1.
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1], [0] * 12])
BLOCK = 4


LAYERS = [
    BlockRule(),
    BlockRule(is_causal=True),
    BlockRule(1),
    BlockRule(3),
    BlockRule(3, "strict"),
    BlockRule(3, "strict", is_causal=True),
    BlockRule(2, "context"),
    BlockRule(2, "anchor"),
    BlockRule(2, "anchor", is_causal=True),
]


def oracle(row: int, query: int, key: int, layer: BlockRule) -> bool:
    length = DOCUMENTS.shape[1]
    anchor, slot = int(ANCHORS[row, query // BLOCK]), query % BLOCK
    window, rule = layer.window, layer.window_rule
    if key < length:
        if key >= anchor or DOCUMENTS[row, key] != DOCUMENTS[row, anchor]:
            return False
        back = anchor - key if rule == "anchor" else anchor + slot - key
        return window is None or (back < window if rule in ("strict", "context") else back <= window)
    block, key_slot = divmod(key - length, BLOCK)
    if block != query // BLOCK or (layer.is_causal and key_slot > slot):
        return False
    if window is None or rule in ("context", "anchor"):
        return True
    return abs(slot - key_slot) < window if rule == "strict" else abs(slot - key_slot) <= window


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_element_follows_the_rule(layer):
    queries, keys = ANCHORS.shape[1] * BLOCK, DOCUMENTS.shape[1] + ANCHORS.shape[1] * BLOCK
    mask = dense_mask(block_mask_rule(ANCHORS, DOCUMENTS, BLOCK, layer), 2, queries, keys, "cpu")
    expected = [[[[oracle(b, q, k, layer) for k in range(keys)] for q in range(queries)]] for b in range(2)]
    assert torch.equal(mask, torch.tensor(expected))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_flex_and_dense_materialise_the_same_rule(layer):
    anchors = torch.tensor([[3, 40, 200, 297]]).repeat(1, 20)
    documents = torch.zeros(1, 300, dtype=torch.long)
    rule = block_mask_rule(anchors, documents, BLOCK, layer)
    size = (1, anchors.shape[1] * BLOCK, 300 + anchors.shape[1] * BLOCK)
    dense = dense_mask(rule, *size, "cpu")
    assert torch.equal(create_mask(rule, size[0], None, *size[1:], device="cpu"), dense)
    blocks = flex_mask(rule, *size, "cpu")
    rows, columns = size[1] // 128 + 1, size[2] // 128 + 1
    padded = torch.zeros(rows * 128, columns * 128, dtype=torch.bool)
    padded[: size[1], : size[2]] = dense[0, 0]
    seen = padded.view(rows, 128, columns, 128).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), seen[: -(-size[1] // 128), : -(-size[2] // 128)])


def test_each_kind_of_layer_gets_its_mask():
    drafter = make_drafter(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
    masks = attention_masks(drafter, ANCHORS, DOCUMENTS)
    assert masks["sliding_attention"].sum() < masks["full_attention"].sum()
    drafter.set_attn_implementation("eager")
    additive = attention_masks(drafter, ANCHORS, DOCUMENTS)["full_attention"]
    assert torch.equal(additive == 0, masks["full_attention"])
    drafter.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no masks"):
        attention_masks(drafter, ANCHORS, DOCUMENTS)
