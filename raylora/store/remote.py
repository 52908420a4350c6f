"""File systems that are not this machine's disk: opening one, and saying in a sentence what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from raylora.errors import UnreachableError

_WITH_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "r2")
_PACKAGES = {"s3": "raylora[s3]", "s3a": "raylora[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
                   "DefaultCredentialsError", "RefreshError")
"""What botocore and google-auth call it; neither is imported, since neither need be there."""


def open_file_system(uri: str) -> tuple[Any, str]:
    """Return a URI's file system and the path in it.

    Listings are never answered from a cache: what another machine wrote a moment ago has to be seen.

    Raises:
        UnreachableError: the package for this kind of storage is missing, or there is no such kind.
    """
    kind = uri.partition("://")[0] if "://" in uri else "file"
    try:
        if kind in ("file", "local"):
            return fsspec.core.url_to_fs(uri)
        with reaching(uri):
            return fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except ImportError as error:
        raise UnreachableError(
            f"{uri}: a package for {kind}:// is not installed ({error})", f"pip install {_PACKAGES.get(kind, kind)}"
        ) from None
    except ValueError:
        raise UnreachableError(
            f"{uri}: no storage is called {kind}://", "use a folder, s3://bucket/path, gs://bucket/path or az://"
        ) from None


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Say in one sentence what keeps a storage from being reached; what it answers about a path passes through.

    Raises:
        UnreachableError: no credentials, or no connection, or it refuses this user.
    """
    if "://" not in uri:  # a local disk, whose errors say enough
        yield
        return
    try:
        yield
    except (FileNotFoundError, FileExistsError, ImportError, ValueError):
        raise
    except Exception as error:
        kind = type(error).__name__
        if kind in _NO_CREDENTIALS:
            raise UnreachableError(
                f"{uri}: there are no credentials for it on this machine",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role",
            ) from None
        if isinstance(error, PermissionError):
            raise UnreachableError(
                f"{uri}: access is refused ({_line(error)})", "these credentials may not read or write there"
            ) from None
        if not isinstance(error, OSError) and (kind.startswith("Client") or "Connect" in kind or "Timeout" in kind):
            raise UnreachableError(
                f"{uri}: cannot be reached ({_line(error)})", "check the network, and AWS_ENDPOINT_URL if it is set"
            ) from None
        raise


def check_bucket(fs: Any, root: str, uri: str) -> None:
    """Refuse a storage that cannot be listed, or whose bucket does not exist. Raises: UnreachableError."""
    protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    with reaching(uri):
        try:
            fs.ls(root, detail=False)
            return
        except FileNotFoundError:
            pass  # nothing was written there yet
        bucket = root.partition("/")[0]
        if set(protocols) & set(_WITH_BUCKETS) and not fs.exists(bucket):
            raise UnreachableError(
                f"storage_path: the bucket {bucket} does not exist", "create it, or choose another storage_path"
            )


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
