"""Keys chosen by what queries and keys say, without training.

A method is a score (`scores`: parts in scores.py), a rule that spends the budget (`rule`: the base's share of each row, or one of
rules.py) and a unit (`block` keys; a block of 1 is a token). A new combination is a class of one line:

    class QuestTopP(TopP, Quest):
        name = "attention/quest_top_p"
"""
