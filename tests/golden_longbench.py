"""What LongBench's prompts must be when the question is "WHO?": (before the document, after it, without it).

The first two are upstream's config/dataset2prompt.json, the third is ours.
"""

_PASSAGES = (
    (
        "Answer the question based on the given passages. Only give me the answer and do not "
        "output any other words.\n\nThe following are given passages.\n"
    ),
    (
        "\n\nAnswer the question based on the given passages. Only give me the answer and do not "
        "output any other words.\n\nQuestion: WHO?\nAnswer:"
    ),
    (
        "Answer the question based on the given passages. Only give me the answer and do not "
        "output any other words.\n\nAnswer the question based on the given passages. Only give me "
        "the answer and do not output any other words.\n\nQuestion: WHO?\nAnswer:"
    ),
)  # three tasks ask alike
GOLDEN: dict[str, tuple[str, str, str]] = {
    "narrativeqa": (
        (
            "You are given a story, which can be either a novel or a movie script, and a question. "
            "Answer the question asconcisely as you can, using a single phrase if possible. Do not "
            "provide any explanation.\n\nStory: "
        ),
        (
            "\n\nNow, answer the question based on the story asconcisely as you can, using a single "
            "phrase if possible. Do not provide any explanation.\n\nQuestion: WHO?\n\nAnswer:"
        ),
        (
            "You are given a story, which can be either a novel or a movie script, and a question. "
            "Answer the question asconcisely as you can, using a single phrase if possible. Do not "
            "provide any explanation.\n\nNow, answer the question based on the story asconcisely as "
            "you can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: "
            "WHO?\n\nAnswer:"
        ),
    ),
    "qasper": (
        (
            "You are given a scientific article and a question. Answer the question as concisely as "
            "you can, using a single phrase or sentence if possible. If the question cannot be "
            'answered based on the information in the article, write "unanswerable". If the question '
            'is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
            "explanation.\n\nArticle: "
        ),
        (
            "\n\n Answer the question based on the above article as concisely as you can, using a "
            "single phrase or sentence if possible. If the question cannot be answered based on the "
            'information in the article, write "unanswerable". If the question is a yes/no question, '
            'answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\nQuestion: WHO?\n\n'
            "Answer:"
        ),
        (
            "You are given a scientific article and a question. Answer the question as concisely as "
            "you can, using a single phrase or sentence if possible. If the question cannot be "
            'answered based on the information in the article, write "unanswerable". If the question '
            'is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
            "explanation.\n\n Answer the question based on the above article as concisely as you can, "
            "using a single phrase or sentence if possible. If the question cannot be answered based "
            'on the information in the article, write "unanswerable". If the question is a yes/no '
            'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
            "Question: WHO?\n\nAnswer:"
        ),
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n",
        (
            "\n\nNow, answer the following question based on the above text, only give me the answer "
            "and do not output any other words.\n\nQuestion: WHO?\nAnswer:"
        ),
        (
            "Read the following text and answer briefly.\n\nNow, answer the following question based "
            "on the above text, only give me the answer and do not output any other words.\n\n"
            "Question: WHO?\nAnswer:"
        ),
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": (
        ("You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"),
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        (
            "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
            "Now, write a one-page summary of the report.\n\nSummary:"
        ),
    ),
    "qmsum": (
        (
            "You are given a meeting transcript and a query containing a question or instruction. "
            "Answer the query in one or more sentences.\n\nTranscript:\n"
        ),
        (
            "\n\nNow, answer the query based on the above meeting transcript in one or more "
            "sentences.\n\nQuery: WHO?\nAnswer:"
        ),
        (
            "You are given a meeting transcript and a query containing a question or instruction. "
            "Answer the query in one or more sentences.\n\nNow, answer the query based on the above "
            "meeting transcript in one or more sentences.\n\nQuery: WHO?\nAnswer:"
        ),
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        (
            "You are given several news passages. Write a one-page summary of all news. \n\nNow, write "
            "a one-page summary of all the news.\n\nSummary:"
        ),
    ),
    "trec": (
        "Please determine the type of the question below. Here are some examples of questions.\n\n",
        "\nWHO?",
        ("Please determine the type of the question below. Here are some examples of questions.\n\nWHO?"),
    ),
    "triviaqa": (
        (
            "Answer the question based on the given passage. Only give me the answer and do not "
            "output any other words. The following are some examples.\n\n"
        ),
        "\n\nWHO?",
        (
            "Answer the question based on the given passage. Only give me the answer and do not "
            "output any other words. The following are some examples.\n\nWHO?"
        ),
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n",
        "\n\nWHO?",
        ("Summarize the dialogue into a few short sentences. The following are some examples.\n\nWHO?"),
    ),
    "passage_count": (
        (
            "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
            "Please carefully read these paragraphs and determine how many unique paragraphs there "
            "are after removing duplicates. In other words, how many non-repeating paragraphs are "
            "there in total?\n\n"
        ),
        (
            "\n\nPlease enter the final count of unique paragraphs after removing duplicates. The "
            "output format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final "
            "answer is: "
        ),
        (
            "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
            "Please carefully read these paragraphs and determine how many unique paragraphs there "
            "are after removing duplicates. In other words, how many non-repeating paragraphs are "
            "there in total?\n\nPlease enter the final count of unique paragraphs after removing "
            "duplicates. The output format should only contain the number, such as 1, 2, 3, and so "
            "on.\n\nThe final answer is: "
        ),
    ),
    "passage_retrieval_en": (
        (
            "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
            "paragraph the abstract is from.\n\n"
        ),
        (
            "\n\nThe following is an abstract.\n\nWHO?\n\nPlease enter the number of the paragraph that "
            'the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", '
            "etc.\n\nThe answer is: "
        ),
        (
            "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
            "paragraph the abstract is from.\n\nThe following is an abstract.\n\nWHO?\n\nPlease enter the "
            "number of the paragraph that the abstract is from. The answer format must be like "
            '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
        ),
    ),
    "lcc": (
        "Please complete the code given below. \n",
        "Next line of code:\n",
        "Please complete the code given below. \nNext line of code:\n",
    ),
    "repobench-p": (
        "Please complete the code given below. \n",
        "WHO?Next line of code:\n",
        "Please complete the code given below. \nWHO?Next line of code:\n",
    ),
}
