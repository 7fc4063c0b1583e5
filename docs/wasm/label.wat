;; A module for sapwood's gateway (and SGLang's): long requests are refused with 413; all others, and
;; all answers, get the header x-label: seen.
(component
  (core module $code
    (memory (export "memory") 1)

    ;; Strings and lists come in through this function: each call takes the next free bytes.
    (global $next (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
      (global.set $next (i32.add (local.get $at) (local.get 3)))
      (block $fits
        (br_if $fits (i32.le_u (global.get $next) (i32.shl (memory.size) (i32.const 16))))
        (br_if $fits (i32.ne (i32.const -1)
          (memory.grow (i32.add (i32.const 1) (i32.shr_u (local.get 3) (i32.const 16))))))
        unreachable)
      (local.get $at))

    ;; One header at 64: pointers to its name and value, with their lengths.
    (data (i32.const 64) "\80\00\00\00\07\00\00\00\87\00\00\00\04\00\00\00")
    (data (i32.const 128) "x-labelseen")

    ;; The action is written at 0. Case 2 is modify: a status, headers to set, to add, to remove, a
    ;; body; all of them are empty but for the list of headers to set, at 8.
    (func $modify (result i32)
      (i32.store8 (i32.const 0) (i32.const 2))
      (i32.store (i32.const 8) (i32.const 64))
      (i32.store (i32.const 12) (i32.const 1))
      (i32.const 0))

    ;; Case 1 is reject, with a status at 4.
    (func $reject (param $status i32) (result i32)
      (i32.store8 (i32.const 0) (i32.const 1))
      (i32.store16 (i32.const 4) (local.get $status))
      (i32.const 0))

    (func (export "on-request")
      (param $method i32) (param $method-length i32) (param $path i32) (param $path-length i32)
      (param $query i32) (param $query-length i32) (param $headers i32) (param $num-headers i32)
      (param $body i32) (param $body-length i32) (param $id i32) (param $id-length i32)
      (param $now-ms i64) (result i32)
      (if (i32.gt_u (local.get $body-length) (i32.const 100000))
        (then (return (call $reject (i32.const 413)))))
      (call $modify))

    (func (export "on-response")
      (param $status i32) (param $headers i32) (param $num-headers i32)
      (param $body i32) (param $body-length i32) (result i32)
      (call $modify)))

  (core instance $made (instantiate $code))

  ;; The interface, smg:gateway.
  (type $header-type (record (field "name" string) (field "value" string)))
  (export $header "header" (type $header-type))
  (type $request-type (record
    (field "method" string) (field "path" string) (field "query" string)
    (field "headers" (list $header)) (field "body" (list u8))
    (field "request-id" string) (field "now-epoch-ms" u64)))
  (export $request "request" (type $request-type))
  (type $response-type (record
    (field "status" u16) (field "headers" (list $header)) (field "body" (list u8))))
  (export $response "response" (type $response-type))
  (type $changes-type (record
    (field "status" (option u16)) (field "headers-set" (list $header))
    (field "headers-add" (list $header)) (field "headers-remove" (list string))
    (field "body-replace" (option (list u8)))))
  (export $changes "modify-action" (type $changes-type))
  (type $action-type (variant (case "continue") (case "reject" u16) (case "modify" $changes)))
  (export $action "action" (type $action-type))

  (func $on-request (param "req" $request) (result $action)
    (canon lift (core func $made "on-request") (memory (core memory $made "memory"))
      (realloc (core func $made "realloc"))))
  (func $on-response (param "resp" $response) (result $action)
    (canon lift (core func $made "on-response") (memory (core memory $made "memory"))
      (realloc (core func $made "realloc"))))
  (instance $requests (export "on-request" (func $on-request)))
  (export "smg:gateway/middleware-on-request" (instance $requests))
  (instance $responses (export "on-response" (func $on-response)))
  (export "smg:gateway/middleware-on-response" (instance $responses))
)
