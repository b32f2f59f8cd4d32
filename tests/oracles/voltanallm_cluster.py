"""One prefill worker and several decode workers in turn, at one clock without noise: each worker followed by itself.

Prompts flow one way, so the prefill worker can be followed to its end first, then every decode worker, token by token
in plain loops. Times are exact fractions.
"""

from fractions import Fraction


def timeline(arrivals, prompts, outputs, *, prefill_ms, decode_ms, transfer_ms, decodes, max_tokens, max_requests=None):
    """First and last token of each request, and gaps between tokens.

    Args:
      arrivals: seconds, ascending.
      prompts: tokens.
      outputs: tokens.
      prefill_ms: function of the tokens of a batch.
      decode_ms: function of the batch size and its tokens.
      transfer_ms: function of the tokens.
      decodes: number of decode workers; request i goes to worker i modulo that number.
      max_tokens: of a batch of prompts.
      max_requests: of a batch of prompts.
    """
    number = len(arrivals)
    first, finish = [None] * number, [None] * number
    gaps = [[] for _ in range(number)]
    now, following = Fraction(0), 0
    while following < number:
        now = max(now, arrivals[following])
        batch = [following]
        while (
            batch[-1] + 1 < number
            and arrivals[batch[-1] + 1] <= now
            and sum(prompts[i] for i in batch) + prompts[batch[-1] + 1] <= max_tokens
            and len(batch) != max_requests
        ):
            batch.append(batch[-1] + 1)
        now += Fraction(prefill_ms(sum(prompts[i] for i in batch))) / 1000
        for i in batch:
            first[i] = now
            if outputs[i] == 1:
                finish[i] = now
        following = batch[-1] + 1
    for worker in range(decodes):
        coming = [
            (first[i] + Fraction(transfer_ms(prompts[i])) / 1000, i)
            for i in range(number)
            if i % decodes == worker and outputs[i] > 1
        ]
        coming.sort()
        held, made, last = {}, {}, {}
        now = Fraction(0)
        while coming or held:
            if not held:
                now = max(now, coming[0][0])
            while coming and coming[0][0] <= now:
                _, i = coming.pop(0)
                held[i], made[i], last[i] = prompts[i], 1, first[i]
            now += Fraction(decode_ms(len(held), sum(held.values()))) / 1000
            for i in list(held):
                held[i] += 1
                made[i] += 1
                gaps[i].append(now - last[i])
                last[i] = now
                if made[i] == outputs[i]:
                    finish[i] = now
                    del held[i]
    return first, finish, gaps
