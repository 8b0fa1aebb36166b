"""Load the files of ann_export.py with the programs that they are for: one short function per format.

    python -m tests.benchmarks.load_exports data/export/triplets.train.csv

Needs tests/requirements-extra.txt, or tests/requirements-flagembedding.txt. The tests run every function.
Images are opened here, not by the trainer: sentence-transformers 6 silently embeds a path or URL as text unless it ends
in .jpg, .jpeg, .png, .gif, .bmp, .tiff or .webp, and a path unless it exists.
"""

import json
import sys
from pathlib import Path


def load_pairs(path):
    """A table of all judged pairs; `split` is "" for a pair across splits."""
    import datasets

    return datasets.load_dataset("csv", data_files=str(path), split="train", keep_default_na=False)


def load_triplets(path):
    """The train_dataset of SentenceTransformerTrainer, for TripletLoss or MultipleNegativesRankingLoss."""
    import datasets

    table = datasets.load_dataset("csv", data_files=str(path), split="train")
    for column in ("anchor", "positive", "negative"):
        table = table.cast_column(column, datasets.Image())  # opens paths and URLs, whatever their extension
    return table


def load_reranking(path):
    """An evaluator: load_reranking(path)(SentenceTransformer("clip-ViT-B-32"))."""
    from PIL import Image
    from sentence_transformers.sentence_transformer.evaluation import RerankingEvaluator  # before 6: s_t.evaluation

    samples = json.loads(Path(path).read_text())
    for sample in samples:
        sample["query"] = Image.open(sample["query"])
        sample |= {key: [Image.open(value) for value in sample[key]] for key in ("positive", "negative")}
    return RerankingEvaluator(samples, write_csv=False)


def load_flagembedding(path):
    """FlagEmbedding's training data: (query, [a positive, negatives ...], None). It embeds them as text.

    Name the file of one split: given a folder, its loader reads all .json and .jsonl files in it.
    """
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderDataArguments, AbsEmbedderTrainDataset

    return AbsEmbedderTrainDataset(AbsEmbedderDataArguments(train_data=[str(path)]), tokenizer=None)


def load_qrels(path):
    """The collection's average precision by the judgments, and its precision at 1 among judged images."""
    import ir_measures
    from ir_measures import AP, P

    run = Path(path).with_suffix(".run")
    judgments, ranking = ir_measures.read_trec_qrels(str(path)), ir_measures.read_trec_run(str(run))
    return ir_measures.calc_aggregate([AP, P(judged_only=True) @ 1], judgments, ranking)


LOADERS = {
    "pairs": load_pairs,
    "triplets": load_triplets,
    "reranking": load_reranking,
    "flagembedding": load_flagembedding,
    "qrels": load_qrels,
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(LOADERS[Path(name).name.partition(".")[0]](name))
