"""Public data: files fetched by pooch, checked by their hash and cached, or local copies of them."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pooch
from _trainer import fail


def data_files(data: Path | None, name: str, url: str, hashes: Mapping[str, str]) -> list[Path]:
    """Where the files are: in the folder that --data gives, any version of them, or in the cache, fetched if need be.

    Args:
        data: that folder, or None.
        name: folder within the cache.
        url: address of the folder on the network, with a slash at its end.
        hashes: SHA-256 of each file on the network.
    """
    if data is not None:
        if not data.is_dir():
            fail(f"--data {data} is not a folder; it must hold {', '.join(hashes)}")
        return [data / file for file in hashes]
    pooch.get_logger().setLevel("WARNING")
    cache = pooch.create(pooch.os_cache("fastrnn") / name, url, registry=dict(hashes))
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty())
    paths = []
    for file in hashes:
        try:
            paths.append(Path(cache.fetch(file, downloader=downloader)))
        except PermissionError as error:
            cause = error.__cause__ or error  # pooch raises some anew
            fail(f"the cache {cache.path} cannot be written: {cause}; set XDG_CACHE_HOME to another folder")
        except ValueError:
            fail(f"{url}{file} is another file than it was; give a folder with any version of it by --data")
        except OSError as error:
            reason = error.strerror or type(error).__name__  # a full disk; no network, an interrupted download
            fail(f"cannot fetch {url}{file} ({reason}); try again, or give a folder with it by --data")
    return paths
