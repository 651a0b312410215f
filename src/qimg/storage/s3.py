"""``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key``: where objects are, and with whose leave.

What no option says comes from the environment, by the names that the stores' own tools use: ``AWS_*`` (and
the file of credentials ``~/.aws/credentials`` with ``AWS_PROFILE``), ``GOOGLE_*``, ``AZURE_*``. Needs the
library obstore (``pip install 'qimg[s3]'``).
"""

from __future__ import annotations

import os

from qimg.errors import LocationError, NotSupported, OptionError
from qimg.options import BOOL, NUM, SIZE, STR, Option
from qimg.storage.objects import ObjectStorage, explain, library_errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self

    from obstore.store import ObjectStore

    from qimg.context import Context
    from qimg.options import Value

#: Seconds without an answer after which a request is given up, and how often it is tried again.
TIMEOUT = 60
RETRIES = 5
_CONNECT_TIMEOUT = "5s"

_COMMON = (
    Option("key", STR, None, "Name of the object in its bucket"),
    Option("endpoint", STR, None, "URL of the service"),
    Option("anonymous", BOOL, False, "Send requests without credentials"),
    Option("timeout", NUM, TIMEOUT, "Seconds to wait for an answer"),
    Option("retries", NUM, RETRIES, "How often a failed request is tried again"),
)


class S3(ObjectStorage):
    """An object of Amazon S3 or of what speaks its language."""

    driver = "s3"
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("bucket", STR, None, "Bucket that holds the object"),
        *_COMMON,
        Option("region", STR, None, "Region of the bucket"),
        Option("access-key-id", STR, None, "Name of the access key"),
        Option("secret-access-key-secret", STR, None, "ID of the secret that is the access key"),
        Option("session-token-secret", STR, None, "ID of the secret that is the token of a session"),
        Option("virtual-hosted-style", BOOL, False, "The bucket is part of the host's name"),
    )
    create_options: ClassVar[tuple[Option, ...]] = (Option("size", SIZE, None, "Virtual disk size"),)
    identity: ClassVar[tuple[str, ...]] = ("bucket", "driver", "endpoint", "key", "region")
    #: What the option `bucket` is called with this store.
    container: ClassVar[str] = "bucket"
    #: Variables of the environment that hold the URL of the service.
    endpoint_variables: ClassVar[tuple[str, ...]] = (
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT",
    )

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        bucket, _, key = name.removeprefix(f"{cls.driver}://").partition("/")
        if not name.startswith(f"{cls.driver}://") or not bucket or not key:
            raise LocationError(f"'{name}' is not of the form {cls.driver}://{cls.container.upper()}/KEY")
        _check_key(key)
        return {cls.container: bucket, "key": key}

    @classmethod
    def from_options(
        cls,
        values: dict[str, Value],
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",  # noqa: ARG003
        discard: bool = True,  # noqa: ARG003
        context: Context | None = None,
    ) -> Self:
        _need_library()
        for name in (cls.container, "key"):
            if not values.get(name):
                raise OptionError(f"Parameter '{name}' is missing", option=name)
        bucket, key = str(values[cls.container]), str(values["key"])
        _check_key(key)
        try:
            store = cls._store_for(bucket, values, _client(values, cls._endpoint(values)), context)
        except library_errors() as error:
            raise OptionError(f"Could not use the {cls.container} '{bucket}': {explain(error)[1]}") from error
        new = cls(store, f"{cls.driver}://{bucket}/{key}", key, writable=writable, create=create)
        new.named = not any(name in values for name in ("account", "endpoint", "region"))
        return new

    @classmethod
    def _endpoint(cls, values: dict[str, Value]) -> str | None:
        """The URL of the service that the user named, None: the store's own."""
        if "endpoint" in values:
            return str(values["endpoint"])
        return next((os.environ[name] for name in cls.endpoint_variables if os.environ.get(name)), None)

    @classmethod
    def _store_for(
        cls, bucket: str, values: dict[str, Value], client: dict[str, object], context: Context | None
    ) -> ObjectStore:
        from obstore.store import S3Store

        config = {
            **_settings(values, endpoint="endpoint", region="region", access_key_id="access-key-id"),
            **_secrets(
                values,
                context,
                secret_access_key="secret-access-key-secret",
                session_token="session-token-secret",
            ),
            "virtual_hosted_style_request": bool(values.get("virtual-hosted-style", False)),
        }
        endpoint = cls._endpoint(values)
        if endpoint is not None:
            config["endpoint"] = endpoint
        if values.get("anonymous"):
            config["skip_signature"] = True
        elif "access_key_id" not in config and "AWS_ACCESS_KEY_ID" not in os.environ:
            config.update(_credentials_file())
        return S3Store(bucket, config=config, **client)  # type: ignore[arg-type]


class Gs(S3):
    """An object of Google Cloud Storage."""

    driver = "gs"
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("bucket", STR, None, "Bucket that holds the object"),
        *_COMMON,
        Option("service-account", STR, None, "File of the service account"),
        Option("service-account-secret", STR, None, "ID of the secret that is the service account's key"),
    )
    identity: ClassVar[tuple[str, ...]] = ("bucket", "driver", "endpoint", "key")
    endpoint_variables: ClassVar[tuple[str, ...]] = ("GOOGLE_BASE_URL",)

    @classmethod
    def _store_for(
        cls, bucket: str, values: dict[str, Value], client: dict[str, object], context: Context | None
    ) -> ObjectStore:
        from obstore.store import GCSStore

        config = {
            **_settings(values, base_url="endpoint", service_account="service-account"),
            **_secrets(values, context, service_account_key="service-account-secret"),
        }
        if values.get("anonymous"):
            config["skip_signature"] = True
        return GCSStore(bucket, config=config, **client)  # type: ignore[arg-type]


class Az(S3):
    """A blob of Azure Blob Storage."""

    driver = "az"
    container = "container"
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("container", STR, None, "Container that holds the object"),
        *_COMMON,
        Option("account", STR, None, "Name of the storage account"),
        Option("account-key-secret", STR, None, "ID of the secret that is the account's key"),
        Option("sas-token-secret", STR, None, "ID of the secret that is a shared access signature"),
    )
    identity: ClassVar[tuple[str, ...]] = ("account", "container", "driver", "endpoint", "key")
    endpoint_variables: ClassVar[tuple[str, ...]] = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")

    @classmethod
    def _store_for(
        cls, bucket: str, values: dict[str, Value], client: dict[str, object], context: Context | None
    ) -> ObjectStore:
        from obstore.store import AzureStore

        config = {
            **_settings(values, endpoint="endpoint", account_name="account"),
            **_secrets(values, context, account_key="account-key-secret", sas_token="sas-token-secret"),
        }
        if values.get("anonymous"):
            config["skip_signature"] = True
        return AzureStore(bucket, config=config, **client)  # type: ignore[arg-type]


def _need_library() -> None:
    """Raise NotSupported where obstore is not installed."""
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        message = "Object stores need the Python package obstore: pip install 'qimg[s3]'"
        raise NotSupported(message) from error


def _check_key(key: str) -> None:
    """Refuse keys that the library would change or cannot send. Raises LocationError."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise LocationError(f"The key '{key}' has an empty part, or one of dots, between its slashes")


def _client(values: dict[str, Value], endpoint: str | None) -> dict[str, object]:
    """How requests are sent: times in seconds; without encryption only to an endpoint that says so."""
    from datetime import timedelta

    timeout = int(values.get("timeout", TIMEOUT))
    retries = int(values.get("retries", RETRIES))
    longest = timedelta(seconds=max(1, retries) * timeout)
    return {
        "client_options": {
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
            "connect_timeout": _CONNECT_TIMEOUT,
            "timeout": f"{timeout}s",
        },
        "retry_config": {
            "max_retries": retries,
            "retry_timeout": longest,
        },
    }


def _settings(values: dict[str, Value], **names: str) -> dict[str, object]:
    """The library's name -> the value of our option, for those that are given."""
    return {theirs: str(values[ours]) for theirs, ours in names.items() if ours in values}


def _secrets(values: dict[str, Value], context: Context | None, **names: str) -> dict[str, object]:
    """The same for options that name a secret. Raises OptionError."""
    found: dict[str, object] = {}
    for theirs, ours in names.items():
        if ours in values and context is not None:
            found[theirs] = context.secret(str(values[ours])).decode("utf-8", "replace")
    return found


def _credentials_file() -> dict[str, str]:
    """Credentials of the profile that is in use from the file of the AWS tools; none where there is none."""
    from configparser import ConfigParser
    from configparser import Error as BadFile

    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or os.path.expanduser("~/.aws/credentials")
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
    except (BadFile, UnicodeDecodeError) as error:
        raise OptionError(f"Could not read the credentials in '{path}'") from error
    profile = os.environ.get("AWS_PROFILE", "default")
    if profile not in parser:
        return {}
    names = {
        "access_key_id": "aws_access_key_id",
        "secret_access_key": "aws_secret_access_key",
        "session_token": "aws_session_token",
    }
    return {theirs: parser[profile][name] for theirs, name in names.items() if name in parser[profile]}
