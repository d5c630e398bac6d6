"""Words of the synthetic problems."""

NAMES = (
    *("Mia", "Tom", "Ann", "Ben", "Eva", "Leo", "Zoe", "Sam", "Ida", "Max", "Amy", "Dan", "Joy", "Kai", "Liv", "Ned"),
    *("Pia", "Ray", "Sue", "Ted", "Uma", "Vic", "Wes", "Yan", "Bob", "Cleo", "Finn", "Gus", "Hana", "Ivan", "Jack"),
    *("Kate", "Lars", "Nora", "Omar", "Paul", "Rosa", "Tara", "Vera", "Will"),
)
THINGS = (
    *("apples", "books", "coins", "cards", "pens", "shells", "stamps", "stones"),
    *("balls", "beads", "cups", "eggs", "kites", "nuts", "plums", "rings"),
)
TOTAL = "total"  # name, in a plan, of a sum that only the final question mentions

SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "sum": "+"}

# {things} agrees with {number}; {others} are the people that the quantity is computed from.
PHRASINGS = {
    "given": ("{name} has {number} {things}.", "{name} owns {number} {things}.", "{name} keeps {number} {things}."),
    "add": (
        "{name} has {number} more {things} than {others}.",
        "{name} owns {number} more {things} than {others}.",
        "Compared to {others}, {name} has {number} more {things}.",
    ),
    "subtract": (
        "{name} has {number} fewer {things} than {others}.",
        "{name} owns {number} fewer {things} than {others}.",
        "Compared to {others}, {name} has {number} fewer {things}.",
    ),
    "multiply": (
        "{name} has {times} as many {plural} as {others}.",
        "{name} owns {times} as many {plural} as {others}.",
        "Compared to {others}, {name} has {times} as many {plural}.",
    ),
    "sum": (
        "{name} has as many {plural} as {others} together.",
        "{name} owns as many {plural} as {others} combined.",
        "{others} together have as many {plural} as {name}.",
    ),
    "ask": (
        "How many {plural} does {name} have?",
        "How many {plural} does {name} own?",
        "What is the number of {plural} that {name} has?",
    ),
    "ask_total": (
        "How many {plural} do {others} have together?",
        "How many {plural} do {others} own together?",
        "What is the total number of {plural} that {others} have?",
    ),
}
