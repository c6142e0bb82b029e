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
    Aaron Abigail Adam Alan Albert Alex Alice Alison Amy Andrea Andrew Angela Anna Arthur Ashley Barbara
    Bella Ben Beth Betty Bill Bob Brian Calvin Cameron Carl Carlos Carol Catherine Charles Charlie Chris
    Christian Claire Clara Clark Colin Craig Daisy Dale Dan Daniel David Dennis Diana Diane Diego Don Doug
    Edgar Edith Edward Edwin Elizabeth Ella Ellen Emily Emma Ethan Eva Frances Francis Frank Gary George
    Gerald Gordon Grace Grant Greg Hannah Harold Harriet Harvey Hassan Heather Helen Henry Holly Howard Hugh
    Ian Iris Ivan Jack Jackie Jake James Jane Janet Jason Jay Jeff Jerome Jerry Jesse Jim Joan Joel John
    Johnny Jordan Jorge Joseph Juan Judith Judy Julia Julie Justin Karen Karl Kate Keith Kelly Ken Kevin Kim
    Larry Laura Lauren Lawrence Lee Leon Leslie Lily Linda Lisa Louis Louise Lucas Lucy Luis Marco Marcus
    Margaret Maria Marie Marion Mark Martha Martin Mary Matt Matthew Max Melissa Mia Mike Milton Miranda
    Monica Morgan Naomi Nathan Neil Nick Nicole Noah Norman Oliver Olivia Oscar Pablo Patricia Patrick Paul
    Penny Peter Phil Philip Rachel Ralph Rex Richard Rick Robert Robin Ron Rosa Ross Roy Ruth Sally Sam
    Samantha Samuel Sandra Sarah Scott Sean Seth Shannon Simon Stephen Steve Steven Stuart Susan Tara Ted
    Teresa Terry Tim Timothy Todd Tom Tommy Tyler Vera Victor Victoria Virginia Wallace Walter Warren Wayne
    Wesley Zach""",
    items="""
    lemon tart | apple pie | carrot cake | chocolate cookie | cinnamon roll | rye cracker | onion bagel |
    ham pizza | garlic baguette | pumpkin scone | cheese board | tomato soup | chicken burger | fish taco |
    bean burrito | egg salad | fruit basket | green smoothie | ginger beer | iced coffee | orange juice |
    milk bottle | butter block | honey jar | olive tin | rice bag | potato sack | red rose | birthday card |
    paper plane | wooden spoon | glass vase | tea pot | coffee mug | dinner plate | bread bin |
    kitchen towel | table lamp | light bulb | door handle | window blind | garden hose | plant pot |
    paint roller | steel nail | copper pipe | brick | floor tile | ladder | hammer | phone case |
    power cable | desk fan | office chair | pencil | notebook | blue folder | printer | map | train ticket |
    beach ball | tennis racket | football | bike pump | rain coat | wool hat | leather belt | cotton shirt |
    white sock | summer skirt | gold ring | silver chain | dog bed | cat toy | bird feeder | teddy bear |
    toy truck | puzzle | board game | gift voucher | grape | melon | nut bar | noodle bowl | hot dog |
    waffle | donut | pretzel | plum jam | chili sauce | corn chip | oyster | crab cake | veggie wrap |
    spring roll | soda can | cocktail | oil filter | spark plug | door mat | wall clock | photo frame |
    picture book | comic | crayon | ruler | eraser | stapler | envelope | sticker | poster | ink cartridge |
    mouse pad | monitor | headset | charger | speaker | screw | bolt | hinge | bracket | drill bit |
    saw blade | rope | hook | bucket lid | flower seed | rake | shed key | fence panel | bath mat |
    shower head | soap bar | pillow | quilt | rug | mattress pad | sandal | boot | glove | hoodie | apron |
    tie | wig""",
    greetings="hi | hello | hi there | hey | hiya | good morning | hello again | hey guys | dear shop | ok so",
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
    we are after {order} for {day} | I was wondering if I could order {order}, {day} is fine |
    it's for {day}: {order} | {order} {day} | is {day} ok for {order} | by {day} we'd need {order} |
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
    do I pay now or later | are you open at 7 | leave it with the guard""",
    thanks="thanks | thank you | thanks a lot | please | cheers | bye | many thanks | see you | ta | ok?",
)
EVAL = Wording(
    names="""
    Adrian Amanda Anthony Benjamin Bruce Caroline Christina Crystal Deborah Donald Eli Eric Fred Graham
    Harry Herbert Isabel Jamie Jenny Joe Jose Julian Katherine Kurt Leo Logan Luke Mario Mason Miguel Nancy
    Nina Owen Percy Rebecca Roger Ryan Sara Sharon Sue Thomas Tony Wade William""",
    items="""
    pork rib | turkey sub | sugar cube | pepper mill | almond | banana | peanut | cereal | candle | mirror |
    blanket | curtain | wheel | helmet | camera | battery pack | keyboard | laptop sleeve | magazine |
    calendar | stamp | drum | jacket | umbrella | tent | lantern | fishing rod | rabbit cage | tractor |
    robot | doll | balloon | ribbon | button | needle | bicycle | vitamin | tablet | socket | valve |
    magnet | barrel | arrow | flag | skate | guitar""",
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
    typed_name = name.lower() if note.islower() and rng.random() < 0.5 else name
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
