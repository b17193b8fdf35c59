%% SPDX-License-Identifier: Apache-2.0
%% One gen_server for each instance; one that fails is started anew, and nothing else.
-module(bench_sup).
-behaviour(supervisor).

-export([start_link/1, add/2]).
-export([init/1]).

start_link(Intensity) ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, Intensity).

add(Id, Shared) ->
    supervisor:start_child(?MODULE, [Id, Shared]).

init(Intensity) ->
    {ok, {#{strategy => simple_one_for_one, intensity => Intensity, period => 5},
          [#{id => instance, start => {bench_instance, start_link, []}, restart => permanent,
             shutdown => 1000, type => worker, modules => [bench_instance]}]}}.
