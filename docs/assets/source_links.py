"""Let pages link to files of the repository, such as ``../lemo_hf/core/sparse_pass.py``.

On a forge such a link works as it stands. In the site, which holds the documentation alone, the
file is put beside the pages.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to; one that is not there makes ``--strict`` fail."""
    root = Path(config.docs_dir).parent
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({path for text in pages for path in LINK.findall(text)}):
        if (root / path).is_file():
            content = (root / path).read_bytes()
            files.append(File.generated(config, f"source/{path}.txt", content=content))
    return files


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Point the links at them, as text that a browser shows."""
    return LINK.sub(r"](source/\1.txt)", markdown)
