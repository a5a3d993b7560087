"""Why the Hugging Face hub does not give what is there: for models and data sets alike.

Errors are known by the names of their classes, so the hub's library is not imported for a message.
"""


def hub_refusal(name: str, page: str, error: BaseException) -> str | None:
    """Why the hub refuses a model or data set, and what to do about it.

    Args:
        name: Of the model or data set, such as Qwen/Qwen3-0.6B.
        page: Its page on the hub.
        error: What the hub's library or one above it raised.

    Returns:
        One line; None if the hub did not refuse: nothing of that name, or no connection.
    """
    for cause in causes(error):
        kinds = class_names(cause)
        if "GatedRepoError" in kinds:
            return f"{name} is gated: accept its terms on {page}, {_token_advice()}"
        if "DisabledRepoError" in kinds:
            return f"{name} was disabled by Hugging Face ({page}); choose another one"
        if kinds & {"RepositoryNotFoundError", "RemoteEntryNotFoundError"}:
            return None
        if "HfHubHTTPError" in kinds:
            return _http_refusal(name, cause)
    return None


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from, down to the first."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def class_names(error: BaseException) -> set[str]:
    """The names of an error's class and of those it is derived from."""
    return {kind.__name__ for kind in type(error).__mro__}


def one_line(error: BaseException) -> str:
    """The text of an error, its line breaks made spaces."""
    return " ".join(str(error).split())


def _token_advice() -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        return "then set HF_TOKEN to a token of that account (or run `hf auth login`)"
    return "with the account whose token is in use (HF_TOKEN), which must be allowed to read it"


def _http_refusal(name: str, error: BaseException) -> str:
    status = error.response.status_code  # type: ignore[attr-defined]
    if status == 401:
        return f"Hugging Face refuses the token in use for {name}; renew or unset HF_TOKEN"
    if status == 429:
        return "Hugging Face refuses more requests for now (429); wait, or set HF_TOKEN"
    return f"Hugging Face does not give {name}: {one_line(error)}"
