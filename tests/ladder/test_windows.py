import torch

from fastgpt2.ladder import BytePairEncoder, GPTDatasetV1, TokenEmbedder, create_dataloader
from fastgpt2.text import BytesTokenizer
from tests.ladder.tiny import story


def test_windows_and_their_targets() -> None:
    windows = GPTDatasetV1("abcdefgh", BytesTokenizer(), max_length=3, stride=2)
    assert [bytes(x.tolist()) for x, _ in (windows[i] for i in range(len(windows)))] == [
        b"abc",
        b"cde",
        b"efg",
    ]
    assert bytes(windows[1][1].tolist()) == b"def"


def test_equals_the_batches_of_create_dataloader() -> None:
    tokenizer = BytePairEncoder.train(story(5), 270)
    for length, stride in ((4, 1), (4, 4), (7, 3), (300, 1)):
        windows = GPTDatasetV1(story(5), tokenizer, length, stride)
        ids = tokenizer.encode(story(5))
        if len(ids) <= length:
            assert len(windows) == 0
            continue
        loader = create_dataloader(ids, 1, length, stride, shuffle=False)
        batches = list(loader)
        assert len(batches) == len(windows)
        for i, (x, y) in enumerate(batches):
            assert torch.equal(x[0], windows[i][0])
            assert torch.equal(y[0], windows[i][1])


def test_token_and_position_are_added() -> None:
    embed = TokenEmbedder(vocab_size=7, emb_dim=5, context_length=4)
    idx = torch.tensor([[6, 0, 6], [1, 1, 1]])
    x = embed(idx)
    assert x.shape == (2, 3, 5)
    for b in range(2):
        for t in range(3):
            expected = embed.tok_emb.weight[idx[b, t]] + embed.pos_emb.weight[t]
            assert torch.equal(x[b, t], expected)
