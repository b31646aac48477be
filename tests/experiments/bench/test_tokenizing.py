"""The benchmark of tokenizing counts what was done."""

import json

from ablab.core.data.corpus import CONFIGS
from ablab.experiments.bench.tokenizing import bench_tokenizing, table


def test_every_byte_of_text_is_counted_once(tmp_path):
    texts = [f"{n} ships sailed; {n * n} came back." for n in range(500)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    found = bench_tokenizing([str(path)], CONFIGS / "embedded" / "tokenizer.json", "body")
    assert found.text_bytes == sum(map(len, texts))
    assert 500 < found.tokens < found.text_bytes
    assert found.by_words
    assert f"{found.cpu_mb_per_second:6.1f} MB/s by processor time" in table(found)
