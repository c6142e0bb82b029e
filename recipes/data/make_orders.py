"""Write the quickstart's data: short messy order notes, and the JSON a shop would file them as.

    python recipes/data/make_orders.py       # rewrites orders-train.jsonl and orders-eval.jsonl beside it

A row is a chat of three messages: one instruction, a note as a customer would type it, a one-line answer:

    hiya, its marco. could i have a couple of lemon tarts for thurs, thx
    {"name": "Marco", "item": "lemon tart", "quantity": 2, "day": "Thu"}

Names and items are copied (with a capital, in the singular); quantities and weekdays are normalised from
small closed sets that both files share, because that mapping is what there is to learn. All else is kept
apart: no name, no word of an item and no three words of a sentence in a row occur in both files, so that
remembering the training rows does not help. Everything is written out here and drawn with Python's own
`random.Random` and a fixed seed, so the files are the same on every machine.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

SYSTEM = "Turn the order into JSON: name, item, quantity, day."
SEED = 7
TRAIN_ROWS, EVAL_ROWS = 960, 120

DAYS = {
    "Mon": "Monday | monday | mon",
    "Tue": "Tuesday | tuesday | tues",
    "Wed": "Wednesday | wednesday | wed",
    "Thu": "Thursday | thursday | thurs",
    "Fri": "Friday | friday | fri",
    "Sat": "Saturday | saturday | sat",
    "Sun": "Sunday | sunday | sun",
}
QUANTITIES = {
    1: "1 | one | a single",
    2: "2 | two | a couple of | a pair of",
    3: "3 | three",
    4: "4 | four",
    5: "5 | five",
    6: "6 | six | half a dozen",
    7: "7 | seven",
    8: "8 | eight",
    9: "9 | nine",
    10: "10 | ten",
    12: "12 | twelve | a dozen",
    20: "20 | twenty",
}
SHORTHAND = {
    "please": "pls | plz",
    "thanks": "thx | tks",
    "you": "u",
    "your": "ur",
    "are": "r",
    "and": "n | &",
    "with": "w",
    "have": "hav",
    "would": "wud",
    "could": "cud",
    "that": "tht",
}


@dataclass(frozen=True)
class Wording:
    """The values and phrases of one file, `|` between them; {name}, {order} and {day} are slots."""

    names: str  # separated by spaces
    items: str
    greetings: str
    name_first: str
    requests: str
    name_last: str
    whole: str  # a request with the name inside
    remarks: str
    thanks: str


TRAIN = Wording(
    names="""
    Aaron Abigail Adam Adams Alan Albert Alex Ali Alison Amanda Amy Andrea Andrew Angela Anna Ashley
    Barbara Beth Beverly Bill Brenda Bruce Calvin Carl Caroline Catherine Christian Cindy Claire Clara
    Clark Collins Craig Crystal Daisy Dan Darwin David Dennis Diana Diane Don Doug Duncan Edgar Edith
    Elena Ella Ellen Emma Eric Ethan Felix Fiona Fred Gabriel Gary Gina Gloria Gordon Grace Grant Greg
    Hannah Harold Harry Hassan Heather Heidi Helen Howard Hugo Ian Irene Iris Ivan Jack Jackie Jamie
    Jane Jasmine Jason Jean Jeff Jenny Jerome Jerry Jesse Jim Joan Joe Johnson Jon Jones Jorge Joseph
    Josh Judy Julia Julian Karen Karl Kate Keith Kelly Ken Kevin Kyle Laura Lauren Lee Leo Leslie Linda
    Lisa Logan Lucas Lucy Lydia Marco Marcus Margaret Maria Marie Mark Marsh Marx Mary Max Maya Melissa
    Mia Miguel Mike Miller Milton Monica Nancy Naomi Natalie Neil Nick Nicole Nina Noah Norman Olga
    Oliver Olivia Oscar Owen Pablo Pamela Pat Pedro Percy Phil Philip Rachel Ralph Ramon Rebecca Rita
    Roger Ron Ross Roy Ruth Ryan Sally Sam Sandra Sara Sarah Scott Sean Seth Shannon Sharon Smith Sofia
    Stan Stella Stephen Steve Stuart Susan Sylvia Tara Taylor Ted Teresa Todd Tony Travis Tyler Van
    Vanessa Vera Virginia Walter Wayne Wendy Wesley Wilson Yusuf Yvonne Zoe""",
    items="""
    apple pie | bean salad | bread roll | egg roll | orange cake | pea soup | sugar bag | meat pie |
    fruit bowl | fruit basket | oil can | oil lamp | water bottle | water tank | soup bowl | soup spoon |
    hot dog | pie | cookie | meal kit | egg | bean bag | green tea | red apple | red onion | black bean |
    white wine | cup cake | paper plate | paper bag | paper cup | paper towel | bath towel | bed sheet |
    bed frame | table lamp | night light | floor lamp | floor mat | wall clock | picture frame |
    photo album | book | book case | board game | model train | model plane | train set | bear | key |
    key chain | chain | belt | coat | rain coat | winter coat | hat | white shirt | blue shirt | boot |
    snow boot | rain boot | sock | tie | robe | mask | hair clip | hair band | pill | tool kit | nail |
    bolt | wall hook | coat hook | coat rack | wine rack | world map | road sign | door sign | door mat |
    door handle | door bell | bell | window lock | car seat | phone | phone case | film roll | printer |
    ink pen | marker | folder | tag | string | bow | bucket | pot | flower pot | fan | filter |
    water filter | air filter | oil filter | water pipe | hose | pool toy | tube | test tube | camp bed |
    camp stove | rose | red rose | seed bag | dog bed | dog bowl | dog collar | cat bed | cat toy |
    cat bowl | fish bowl | pet bed | pet carrier | monitor | power cable | power strip | power pack |
    plug | socket | tile | floor tile | wood board | board | panel | step stool | rug | floor rug |
    travel bag | sand bag | stone | mat | ball pump | shell | moon lamp | snake toy | rib | wrap |
    bean wrap | pea pod | fan belt | wine bottle | oil bottle | pot lid | bag strap | seat cover | gate |
    door frame | tower | play mat | head light | watch strap | sand clock | ski mask | cup holder |
    phone holder | pen holder | train ticket | bus ticket | science book | craft kit | science kit |
    model kit | sound system | video game | video tape | wood chip | corn chip | hot plate |
    building block | cook book | root beer | fruit juice | lemon tart | carrot cake | tomato soup |
    chocolate cookie | cinnamon roll | iced coffee | ginger beer | toy truck | teddy bear | leather belt |
    cotton shirt | wooden spoon | kitchen towel | pencil | notebook | puzzle | chicken burger |
    cheese board | potato sack | birthday card | garden hose | paint roller | office chair |
    tennis racket | summer skirt | silver chain | picture book | drill bit | light bulb | pillow""",
    greetings="""
    hi | hello | hi there | hey | hiya | good morning | hello again | hey guys | dear shop | ok so""",
    name_first="""
    this is {name} | it's {name} | {name} here | my name is {name} | {name} calling | I'm {name} |
    {name} again | it's {name} from down the road | order for {name} | name: {name} | {name} |
    good day, {name} here""",
    requests="""
    can I get {order} for {day} | I'd like {order} on {day} | could I have {order} for {day} |
    I need {order} by {day} | please send me {order} on {day} | {order} for {day} | for {day}, {order} |
    on {day} I want {order} | I want to order {order}, need it {day} | we need {order} this {day} |
    can you keep {order} for me until {day} | put aside {order}, I'm coming on {day} |
    {day} I'll come by for {order} | do you have {order}? would be for {day} |
    we are after {order} for {day} | wondering if I could order {order}, {day} is fine |
    it's for {day}: {order} | {order} {day} | is {day} ok for {order} | by {day} we need {order} |
    {order}. for {day} | {day}: {order} | we'll take {order}, {day} please |
    what would {order} cost? I'd come {day}""",
    name_last="""
    name is {name} | it's for {name} | {name} | regards, {name} | - {name} | love, {name} |
    the name's {name} | from {name} | under {name} | just say {name} | this was {name} | best, {name} |
    you know me, {name}""",
    whole="""
    {name} wants {order} for {day} | {order} for {name}, {day} | {day}: {order}, {name} |
    {day} {name} {order} | put {name} down for {order} on {day} | {name} needs {order} by {day} |
    {name} called about {order} for {day} | new order from {name}, {order}, to be ready on {day} |
    {name} asked for {order}, coming {day} | on {day} {name} would like {order} | {name}, {order}, {day} |
    {order}, {day}, {name} | {day}, {name}: {order}""",
    remarks="""
    I'll be there at 5 | my car is the red one | same as last time | it's for a party | no rush |
    I can pay cash | call me if there is a problem | we loved the last one | around 10 in the morning |
    sorry for the late message | hope you are well | my number ends in 42 | we live at number 9 |
    not too expensive I hope | I will send my son | the kids can't wait | last time it was late |
    do I pay now or later | are you open at 7 | leave it with the guard | there will be 60 of us |
    it's flat 18, second floor | the bus takes me 45 minutes | we are only 2 at home |
    sorry for the noise here, 30 kids""",
    thanks="thanks | thank you | thanks a lot | please | cheers | bye | many thanks | see you | ta | ok?",
)
EVAL = Wording(
    names="""
    Alice Arthur Ben Bob Charles Chris Daniel Donald Edward Elizabeth Emily Frank George Henry Jackson
    James John Kim Leon Lincoln Louis Luke Madison Martin Matt Newton Paul Peter Ray Richard Robert
    Samuel Simon Thomas Tim Victor William""",
    items="""
    robot | stamp | calendar | oven | horn | pig | heart | castle | space rocket | arrow | target |
    shield | button | thread | wallet | radio | camera | horse blanket | pine tree | tree house |
    vitamin | wheel | school uniform | machine | motor | hand mirror | gold coin | gold ring | ear ring |
    bird cage | bird house | face cream | ice cream | ice cube | fire alarm | fire log | jam jar |
    pickle jar | flag pole | memory stick | walking stick | fishing net | fishing rod | nut bar |
    oat bar | wing""",
    greetings="good afternoon | greetings | evening all | yo | excuse me | howdy",
    name_first="you're speaking to {name} | {name} on the line | me, {name} | {name} writing",
    requests="""
    any chance of {order} come {day} | might you sell me {order}, collecting {day} |
    got room for {order} {day}? | I shall require {order} no later than {day} |
    let me book {order}, pick up {day} | how about {day}, {order} |
    could somebody prepare {order} before {day} | my wife is hoping for {order} when {day} comes""",
    name_last="{name} will collect | yours, {name} | ask for {name} | signed {name}",
    whole="""
    {name} phoned, {order}, collecting {day} | customer {name} is buying {order}, pickup {day} |
    reserve {order} under the name {name}, due {day} | {day} pickup, {name}, {order}""",
    remarks="""
    arriving about 4 | parking is awful near you | gluten makes me ill | I'm at house 31 |
    grandma turns 80 | text when done | running behind today""",
    thanks="much appreciated | ciao | kind wishes | have a nice one | so grateful",
)


def choices(text: str) -> list[str]:
    """Split one of the lists above."""
    return [" ".join(entry.split()) for entry in text.split("|")]


def messy(phrase: str, rng: random.Random) -> str:
    """Type a phrase as people do: shorthand, lost apostrophes, swapped letters; never inside a {slot}."""
    words = []
    for word in phrase.split():
        bare = word.strip(",.?:")
        if bare in SHORTHAND and rng.random() < 0.4:
            word = word.replace(bare, rng.choice(choices(SHORTHAND[bare])))
        elif len(bare) > 4 and bare.isalpha() and rng.random() < 0.05:
            at = rng.randrange(1, len(bare) - 2)
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif "'" in word and rng.random() < 0.5:
            word = word.replace("'", "")
        words.append(word)
    return " ".join(words)


def make_note(wording: Wording, rng: random.Random) -> str:
    """Compose one note, with {slots} for its three values."""
    parts = {
        "whole": [wording.whole],
        "name first": [wording.name_first, wording.requests],
        "name last": [wording.requests, wording.name_last],
    }[rng.choice(["whole", "name first", "name last"])]
    if rng.random() < 0.5:
        parts.insert(0, wording.greetings)
    if rng.random() < 0.35:
        parts.insert(rng.randrange(1, len(parts) + 1), wording.remarks)
    if rng.random() < 0.4:
        parts.append(wording.thanks)
    joint = rng.choice([", ", ", ", ". ", " ", "! ", "... "])
    return joint.join(messy(rng.choice(choices(part)), rng) for part in parts)


def make_row(wording: Wording, rng: random.Random) -> dict:
    """Draw one row in the `messages` format."""
    name, item = rng.choice(wording.names.split()), rng.choice(choices(wording.items))
    quantity, day = rng.choice(list(QUANTITIES)), rng.choice(list(DAYS))
    order = rng.choice(choices(QUANTITIES[quantity])) + f" {item}" + ("s" if quantity > 1 else "")
    note = make_note(wording, rng)
    note = note.lower() if rng.random() < 0.6 else note[0].upper() + note[1:]
    typed_name = name.lower() if note.islower() and rng.random() < 0.4 else name
    note = note.format(name=typed_name, order=order, day=rng.choice(choices(DAYS[day])))
    answer = json.dumps({"name": name, "item": item, "quantity": quantity, "day": day})
    roles = {"system": SYSTEM, "user": note, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in roles.items()]}


def make_lines(wording: Wording, count: int) -> list[str]:
    """Return `count` different rows as JSON lines; the same on every call."""
    rng, lines = random.Random(SEED), {}
    while len(lines) < count:
        lines[json.dumps(make_row(wording, rng))] = None
    return list(lines)


def write_files(folder: Path) -> None:
    """Write both files into `folder`."""
    for name, wording, count in [("train", TRAIN, TRAIN_ROWS), ("eval", EVAL, EVAL_ROWS)]:
        text = "".join(line + "\n" for line in make_lines(wording, count))
        (folder / f"orders-{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_files(Path(__file__).parent)
