"""How evaluation tools read answers, written down rule by rule and slowly."""

import re

LEADS = ["answer is", "option is", "choice is", "i choose", "i select", "i pick", "\u9009", "\u7b54\u6848\u662f"]
PREFIXES = {
    "answer is": ["", "the ", "correct ", "the correct ", "best ", "the best ", "my "],
    "option is": ["correct ", "the correct ", "best ", "the best "],
    "choice is": ["", "the ", "correct ", "the correct ", "my "],
}


def strip_thinking(text):
    """One block after the other; then, if no opening is left, all up to the last closing tag."""
    for name in ("think", "analysis"):
        while block := re.search(f"<{name}>(?:(?!</{name}>).)*</{name}>", text, re.DOTALL):
            text = text[: block.start()] + text[block.end() :]
        if f"<{name}>" not in text:
            text = text.split(f"</{name}>")[-1]
    return text.strip()


def closing_number(text):
    for line in reversed(text.strip().split("\n")):
        found = re.search(r"\b(\d+(?:\.\d+)?)\b(?:\s*\.?\s*$)", line)
        if found:
            return found[1]
    return None


def lmms_eval_letter(text, letters):
    text = text.strip()
    if not text:
        return ""
    for character in [",", ".", "!", "?", ";", ":", "'", '"']:
        text = text.strip(character)
    body, text = text.strip(), f" {text} "
    scored = []  # (rank, position, -order, letter)
    for order, letter in enumerate(letters):
        if body[:1] == letter and not (len(body) > 1 and body[1].isalpha()):
            scored.append((10, 0, -order, letter))
        if body[-1:] == letter and not (len(body) > 1 and body[-2].isalpha()):
            scored.append((9, 0, -order, letter))
        for lead in LEADS:
            for prefix in PREFIXES.get(lead, [""]):
                if prefix + lead in text.lower():
                    after = text.lower().index(prefix + lead) + len(prefix + lead)
                    if letter in text[after:]:
                        scored.append((7, text.index(letter, after), -order, letter))
        for rank, form in ((6, "(%s)"), (5, "%s."), (4, "%s:"), (3, "%s)"), (2, "%s ")):
            places = [m.start() for m in re.finditer(re.escape(form % letter), text)]
            scored += [(rank, place, -order, letter) for place in places]
    if not scored:
        scored = [(0, place, 0, text[place]) for place in range(len(text)) if text[place] in letters]
    return max(scored)[3] if scored else ""


def vlmevalkit_letter(text, choices):
    words = "".join(" " if character in ".()[],:;!*#{}" else character for character in text).split()
    present = {word for word in words if word in choices}
    if len(present) == 1:
        (letter,) = present
        if words.index(letter) > len(words) - 5:
            return letter
    if not present and "Z" in words:
        return ""
    declared = re.search(rf"answer is\s*\**\s*([{''.join(choices)}])", text, re.IGNORECASE)
    if declared:
        return declared[1].upper()
    if len(text) > 2 * len("".join(choices.values())):
        return ""
    inside = [letter for letter, option in choices.items() if option.lower() in text.lower()]
    return inside[0] if len(inside) == 1 else ""


def vlmevalkit_regex_letter(text, letters):
    text = text.strip()
    for lead in ("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is"):
        text = text.replace(lead, "")
    for lead in ("The correct option is", "Best answer:", "Best option:"):
        text = text.replace(lead, "")
    capitals = [character for character in text if character in "ABCDE"]
    if capitals:
        return capitals[0]
    if len(text.split()) > 10:
        return ""
    for letter in letters:
        if text.lower() in f"({letter.lower()})":
            return letter
    return ""
