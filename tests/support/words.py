"""A tokenizer of words, in the form of Hugging Face's, to see exactly what happens to tokens."""


class Words:
    """Each new word gets the next number. Specials: 0 pad, 1 begin, 2 end, 3 separator."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, begin=True):
        self.numbers = {}
        self.begin = begin

    def number(self, word):
        return self.numbers.setdefault(word, 10 + len(self.numbers))

    def __call__(
        self, texts, pairs=None, *, add_special_tokens=True, truncation=False, max_length=None
    ):
        ids, types = [], []
        for i, text in enumerate(texts):
            first = [self.number(word) for word in text.split()]
            if add_special_tokens and self.begin:
                first = [1, *first]
            second = [] if pairs is None else [3, *map(self.number, pairs[i].split())]
            whole = [*first, *second]
            if truncation:
                whole = whole[:max_length]
            ids.append(whole)
            types.append(([0] * len(first) + [1] * len(second))[: len(whole)])
        return {"input_ids": ids, "token_type_ids": types}
