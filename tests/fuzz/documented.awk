# SPDX-License-Identifier: MIT OR Apache-2.0
#
# From the headers: a row {"call", ERRNO} for each errno that the text of a call names, and {"*", ERRNO} for those of
# struct kuf, which any call may return.

FNR == 1 || /^\/\*/ { text = "" }
/^ ?\*|^\/\*/ { text = text " " $0; next }
text != "" && (/^struct kuf;/ || match($0, /kuf_[a-z_]+\(/)) {
    name = /^struct kuf;/ ? "*" : substr($0, RSTART, RLENGTH - 1)
    split("", seen)
    while (match(text, /-E[A-Z0-9]+/)) {
        error = substr(text, RSTART + 1, RLENGTH - 1)
        if (!(error in seen)) {
            seen[error] = 1
            printf "{\"%s\", %s},\n", name, error
        }
        text = substr(text, RSTART + RLENGTH)
    }
    text = ""
}
