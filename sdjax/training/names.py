"""What to call a concept: Unicode's names for emojis, as people say them, with their articles."""

import re
from collections.abc import Iterable

# Unicode's short name -> ours, where it is no noun ("locked"), tells emojis apart rather than saying what is seen
# ("front-facing baby chick"), or is not the everyday word ("lady beetle"). Names stay unique.
RENAMED = dict(
    line.strip().split(" = ")
    for line in """
    rolling on the floor laughing = face rolling on the floor laughing
    star-struck = star-struck face
    smiling face with halo = smiling face with a halo
    smiling face with tear = smiling face with a tear
    face with tongue = face with its tongue out
    winking face with tongue = winking face with its tongue out
    squinting face with tongue = squinting face with its tongue out
    face with hand over mouth = face with a hand over its mouth
    face with open eyes and hand over mouth = face with open eyes and a hand over its mouth
    face with peeking eye = face with a peeking eye
    face with raised eyebrow = face with a raised eyebrow
    face with medical mask = face with a medical mask
    face with thermometer = face with a thermometer
    face with head-bandage = face with a bandage
    face with monocle = face with a monocle
    face with diagonal mouth = face with a diagonal mouth
    face with open mouth = face with an open mouth
    frowning face with open mouth = frowning face with an open mouth
    face with steam from nose = face with steam from its nose
    face with symbols on mouth = face with symbols on its mouth
    face screaming in fear = screaming face
    cat with wry smile = cat with a wry smile
    heart with arrow = heart with an arrow
    heart with ribbon = heart with a ribbon
    pile of poo = poop
    heart exclamation = heart exclamation mark
    hundred points = hundred points sign
    dizzy = dizzy star
    dashing away = puff of air
    eye in speech bubble = eye in a speech bubble
    right anger bubble = anger bubble
    front-facing baby chick = chick facing forward
    baby chick = chick
    bug = caterpillar
    lady beetle = ladybug
    honeybee = bee
    leaf fluttering in wind = leaf in the wind
    kiwi fruit = kiwi
    hot pepper = chili pepper
    leafy green = leafy vegetable
    baguette bread = baguette
    meat on bone = meat on the bone
    poultry leg = chicken leg
    cut of meat = steak
    cooking = fried egg in a pan
    shallow pan of food = pan of food
    bowl with spoon = bowl with a spoon
    salt = salt shaker
    canned food = can of food
    cooked rice = bowl of rice
    steaming bowl = bowl of noodles
    fish cake with swirl = fish cake
    soft ice cream = soft ice cream cone
    hot beverage = cup of coffee
    teacup without handle = cup of tea
    bottle with popping cork = champagne bottle
    wine glass = glass of wine
    pouring liquid = pouring glass
    cup with straw = cup with a straw
    beverage box = juice box
    mate = mate drink
    ice = ice cube
    fork and knife with plate = plate with fork and knife
    globe showing Europe-Africa = globe showing Europe and Africa
    globe showing Americas = globe showing the Americas
    globe showing Asia-Australia = globe showing Asia and Australia
    globe with meridians = globe grid
    mount fuji = Mount Fuji
    camping = campsite
    beach with umbrella = beach with an umbrella
    building construction = construction site
    construction = construction barrier
    brick = brick wall
    house with garden = house with a garden
    wood = log
    hindu temple = Hindu temple
    shinto shrine = Shinto shrine
    kaaba = Kaaba
    Tokyo tower = Tokyo Tower
    wedding = wedding chapel
    foggy = foggy city
    night with stars = starry night
    ferris wheel = Ferris wheel
    metro = metro train
    light rail = light rail train
    station = train station
    automobile = car
    oncoming automobile = oncoming car
    sport utility vehicle = SUV
    articulated lorry = semi truck
    police car light = police light
    ring buoy = life buoy
    airplane departure = airplane taking off
    airplane arrival = airplane landing
    luggage = suitcase
    hourglass done = hourglass
    hourglass not done = hourglass with flowing sand
    watch = wristwatch
    timer clock = timer
    mantelpiece clock = mantel clock
    sun with face = sun with a face
    milky way = Milky Way
    sun behind cloud = sun behind a cloud
    sun behind small cloud = sun behind a small cloud
    sun behind large cloud = sun behind a large cloud
    sun behind rain cloud = sun behind a rain cloud
    umbrella with rain drops = umbrella in the rain
    umbrella on ground = beach umbrella
    high voltage = lightning bolt
    snowman = snowman in the snow
    snowman without snow = snowman
    droplet = water drop
    water wave = wave
    moon viewing ceremony = moon viewing scene
    wrapped gift = gift
    reminder ribbon = awareness ribbon
    1st place medal = gold medal
    2nd place medal = silver medal
    3rd place medal = bronze medal
    american football = American football
    rugby football = rugby ball
    tennis = tennis racket and ball
    bowling = bowling ball and pins
    cricket game = cricket bat and ball
    field hockey = field hockey stick and ball
    ice hockey = ice hockey stick and puck
    lacrosse = lacrosse stick and ball
    ping pong = ping pong paddle and ball
    badminton = badminton racket and shuttlecock
    flag in hole = golf hole with a flag
    pool 8 ball = eight ball
    video game = game controller
    piñata = pinata
    mirror ball = disco ball
    joker = joker card
    mahjong red dragon = mahjong tile
    flower playing cards = flower playing card
    performing arts = theater masks
    thread = spool of thread
    yarn = ball of yarn
    woman's clothes = blouse
    one-piece swimsuit = swimsuit
    thong sandal = flip-flop
    billed cap = baseball cap
    rescue worker's helmet = rescue helmet
    gem stone = gemstone
    speaker low volume = speaker at low volume
    speaker medium volume = speaker at medium volume
    speaker high volume = speaker at high volume
    bell with slash = crossed-out bell
    headphone = headphones
    musical keyboard = piano keyboard
    mobile phone with arrow = mobile phone with an arrow
    keyboard = computer keyboard
    computer disk = minidisc
    optical disk = CD
    dvd = DVD
    film frames = film strip
    camera with flash = camera with a flash
    notebook with decorative cover = decorated notebook
    page with curl = curled page
    page facing up = page
    money with wings = dollar bills with wings
    chart increasing with yen = rising chart with a yen sign
    chart increasing = rising chart
    chart decreasing = falling chart
    e-mail = email symbol
    envelope with arrow = envelope with an arrow
    closed mailbox with raised flag = closed mailbox with a raised flag
    closed mailbox with lowered flag = closed mailbox with a lowered flag
    open mailbox with raised flag = open mailbox with a raised flag
    open mailbox with lowered flag = open mailbox with a lowered flag
    ballot box with ballot = ballot box
    black nib = pen nib
    straight ruler = ruler
    locked = padlock
    unlocked = open padlock
    locked with pen = padlock with a pen
    locked with key = padlock with a key
    pick = pickaxe
    carpentry saw = saw
    link = chain link
    dna = DNA
    x-ray = X-ray
    satellite antenna = satellite dish
    couch and lamp = couch and a lamp
    roll of paper = roll of toilet paper
    soap = bar of soap
    moai = moai statue
    identification card = ID card
""".strip().splitlines()
)

# Plurals, substances and proper names: said without an article.
BARE = frozenset(
    " ".join(name.split())
    for name in re.split(
        ";",
        """poop; revolving hearts; two hearts; sweat droplets; ZZZ; paw prints; coral; grapes; cherries;
        blueberries; broccoli; garlic; peanuts; beans; bread; pancakes; meat on the bone; bacon; french fries;
        falafel; fondue; popcorn; butter; curry rice; spaghetti; oden; sushi; dango; shaved ice; ice cream; candy;
        custard; sake; clinking beer mugs; clinking glasses; bubble tea; chopsticks; Mount Fuji; houses; Tokyo
        Tower; hot springs; fog; fire; fireworks; sparkles; Japanese dolls; admission tickets; skis; nesting dolls;
        theater masks; glasses; sunglasses; goggles; jeans; gloves; socks; shorts; briefs; shopping bags; ballet
        shoes; prayer beads; musical notes; control knobs; headphones; maracas; books; bookmark tabs; dollar bills
        with wings; card index dividers; linked paperclips; scissors; crossed swords; chains; DNA; bubbles""",
    )
)
WITH_THE = frozenset({"Statue of Liberty", "Kaaba", "Milky Way"})

HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
CONSONANT_SOUND = re.compile(r"uni|eu|ewe|one")  # "a unicorn", "a euro banknote"
VOWEL_SOUND = re.compile(r"[aeiou]|hour|suv|x-ray")  # "an hourglass", "an SUV"


def short_name(unicode_name: str) -> str:
    """One spoken name, ASCII: "lady beetle" -> "ladybug", "one-thirty" -> "clock at half past one"."""
    name = unicode_name.replace("\u2019", "'")
    hour, _, minutes = name.partition("-")
    if hour in HOURS and minutes == "thirty":
        return f"clock at half past {hour}"
    if name.endswith(" o'clock"):
        return f"clock at {name}"
    return RENAMED.get(name, name)


def short_names(unicode_names: Iterable[str]) -> list[str]:
    """The spoken names of all concepts, refused where two come out alike.

    Raises:
        ValueError: two concepts have one name; it says which.
    """
    spoken_for: dict[str, str] = {}
    for unicode_name in unicode_names:
        name = short_name(unicode_name)
        if name in spoken_for:
            raise ValueError(f"names: {unicode_name!r} and {spoken_for[name]!r} are both called {name!r}; rename one")
        spoken_for[name] = unicode_name
    return list(spoken_for)


def indefinite(phrase: str) -> str:
    """Put "a" or "an" before a phrase, by sound: "a unicorn", "an hourglass"."""
    start = phrase.lower()
    vowel = VOWEL_SOUND.match(start) and not CONSONANT_SOUND.match(start)
    return f"{'an' if vowel else 'a'} {phrase}"


def with_article(name: str) -> str:
    """A concept as a sentence names it: "an apple", "chopsticks", "the Milky Way"."""
    if name in BARE:
        return name
    return f"the {name}" if name in WITH_THE else indefinite(name)
