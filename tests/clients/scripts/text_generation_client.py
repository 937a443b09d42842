"""text-generation, TGI's own client."""

from report import API_KEY, SERVER_URL, check, feature
from text_generation import Client

client = Client(SERVER_URL, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60)


@feature("generate")
def _() -> None:
    answer = client.generate("One, two,", max_new_tokens=8, decoder_input_details=True)
    check(answer.generated_text and len(answer.details.tokens) == 8, answer)
    check(answer.details.prefill[0].text == "One", answer.details.prefill)


@feature("stream")
def _() -> None:
    whole = client.generate("One, two,", max_new_tokens=8).generated_text
    events = list(client.generate_stream("One, two,", max_new_tokens=8))
    text = "".join(event.token.text for event in events if not event.token.special)
    check(text == whole == events[-1].generated_text, text)


@feature("sampling, best_of")
def _() -> None:
    answer = client.generate("One", do_sample=True, best_of=2, max_new_tokens=8)
    check(len(answer.details.best_of_sequences) == 1, answer)


@feature("chat")
def _() -> None:
    answer = client.chat([{"role": "user", "content": "Say hello."}], max_tokens=8)
    check(answer.choices[0].message.content, answer)


@feature("errors")
def _() -> None:
    try:
        client.generate("One", max_new_tokens=10**6)
    except Exception as error:
        return check(type(error).__name__ == "ValidationError", type(error))
    check(False, "no error")
