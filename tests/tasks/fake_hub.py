"""A hub that is a folder, for tests: revisions are resolved and files are read without network."""

import warnings
from types import SimpleNamespace

with warnings.catch_warnings(action="ignore"):  # of other packages, when it is imported
    import datasets

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(monkeypatch, hub_id, folder):
    """Lets the hub have one data set, the files in ``folder``, with one commit.

    Returns:
        A list that receives what is asked: (data set, revision), and the address of each file.
    """
    asked = []
    address = f"hf://datasets/{hub_id}@{COMMIT}/"

    def dataset_info(self, repo_id, *, revision=None, timeout=None):
        asked.append((repo_id, revision))
        assert 0 < timeout <= 15
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
        siblings = [SimpleNamespace(rfilename=name) for name in ["README.md", *names]]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    load = datasets.load_dataset

    def load_dataset(kind, *, data_files, streaming, **options):
        assert streaming
        [file] = data_files
        if file.startswith(address):
            asked.append(file)
            file = str(folder / file.removeprefix(address))
        return load(kind, data_files=[file], streaming=streaming, **options)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked
